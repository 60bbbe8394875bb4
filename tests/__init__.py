"""The proof. Run from a checkout: `python -m pytest`; `-m slow` for the long ones, `-m gpu` where there is a card.

    oracle/      the same numbers as the library that people trust; each comparison is a row of the parity table
    invariant/   what must hold whatever the numbers: causality, resume, packing; each with a mutant that must fail
    fault/       bad input, full disks, killed processes, through the real command
    bench/       speed, as ratios: `python -m tests.bench`; figures and conditions in bench/RESULTS.md
    gpu/         what only a card can show; skips itself without one
    mutants/     `python -m tests.mutants` changes the source in one place at a time, and lists the changes that no test notices

    conftest chat_runs chat_tokenizers chats compare damage drawings folders made pairs pairs_of_texts policy_runs
    preference_runs questions ranks records runs seq2seq tagged texts wordnet  shared by several
    proofs       `python -m tests.proofs` writes docs/proofs.md: the tests of each public name
    policy_table        `python -m tests.policy_table` prints the table of policy losses, with numbers computed
    preference_table    `python -m tests.preference_table` prints the table of preference losses, with numbers computed
    previews     `python -m tests.previews` writes invariant/data/previews.txt: what chat templates make of conversations
"""
