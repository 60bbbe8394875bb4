"""Texts and settings that a score does not fit: what is said of them, once, and what is passed over in silence."""

import json
import warnings

import pytest

from eval.__main__ import main
from eval.answers import Answers, answer_scores
from eval.bleu import Bleu, corpus_bleu
from eval.chrf import corpus_chrf
from eval.meteor import meteor_score
from eval.notes import Notes
from eval.rouge import Rouge, rouge_scores
from tests.pairs import word_pairs
from tests.runs import command

SPACED = {
    "French": "Le café était fermé à l'été, où l'élève répétait déjà.",
    "German": "Die Mädchen hören schöne Lieder über große Bäume.",
    "Italian": "La città è più bella così, perché è già estate.",
    "Russian": "Кошка тихо спит в саду.",
    "Greek": "Η γάτα κοιμάται ήσυχα στον κήπο.",
    "Arabic": "القطة نائمة بهدوء في الحديقة.",
    "Hindi": "बिल्ली बगीचे में चुपचाप सो रही है।",
    "Korean": "고양이가 정원에서 조용히 자고 있다.",
}
UNSPACED = {
    "Chinese": "春天的花园里开满了鲜花。",
    "Japanese": "猫が庭で静かに眠っている。",
    "Thai": "แมวนอนหลับอย่างเงียบ ๆ ในสวน",
    "Lao": "ແມວນອນຫຼັບຢູ່ໃນສວນ",
    "Khmer": "ឆ្មាកំពុងដេកនៅក្នុងសួនច្បារ",
    "Burmese": "ကြောင်သည်ဥယျာဉ်ထဲတွင်အိပ်နေသည်",
    "Tibetan": "ཞི་མི་ལྡུམ་རའི་ནང་དུ་གཉིད་ཉལ་བཞིན་འདུག",
    "Chinese with a brand": "iPhone 15 发布会在北京举行，售价 799 美元。",
}
ENGLISH = "The quick brown fox jumps over the lazy dog beside the quiet river, and naps."
SEGMENTED = {
    "Chinese": "春天 的 花园 里 开满 了 鲜花 。",
    "Thai": "แมว นอน หลับ อย่าง เงียบ ๆ ใน สวน มหาวิทยาลัย",
    "Japanese": "猫 が 庭 で 静か に 眠っ て いる 。",
}


def said(call) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call()
    assert all(each.category is UserWarning and each.filename == __file__ for each in told), "at the line of the caller"
    return [str(each.message) for each in told]


@pytest.mark.parametrize("language", [*SPACED, *UNSPACED])
def test_letters_that_rouge_drops(language):
    """On either side, and among others: the references alone, half of the examples, one word in forty."""
    text = (SPACED | UNSPACED)[language]
    for hypotheses, references in (([text], [text]), ([ENGLISH], [text]), ([text, ENGLISH], [ENGLISH, ENGLISH])):
        (note,) = said(lambda h=hypotheses, r=references: rouge_scores(h, r))
        assert note.startswith("ROUGE's words are of a-z and 0-9: ") and "tokenize='unicode', --tokenize unicode" in note
    assert said(lambda: rouge_scores([text], [text], tokenize="char")) == []
    unspaced = said(lambda: rouge_scores([text], [text], tokenize="unicode"))
    assert len(unspaced) == (language in UNSPACED and language != "Tibetan")  # whose syllables have a mark between them


def test_the_share_of_dropped_letters():
    """Of 19 and 21 letters "ï" and what a capital with a dot becomes, but not the Kelvin sign, whose small letter is k."""
    (note,) = said(lambda: rouge_scores(["naïve ideas are common"], ["\u212aelvin ideas ar İmmense"]))
    assert "5.3 % of the letters of hypotheses and 4.8 % of those of references (ï, \u0307) are dropped. " in note
    (note,) = said(lambda: rouge_scores(["да", "no"], ["да", "no"]))
    assert "50.0 % of the letters of hypotheses" in note and ", and 2 of 4 texts lose most of theirs" in note


def test_one_letter_in_200_and_one_text_of_many():
    """Few such letters pass; a text that has not much else is said however many others there are."""
    for letters, notes in ((200, 1), (201, 0)):
        text = "é" + "e" * (letters - 1)
        assert len(said(lambda text=text: rouge_scores([text], ["e"]))) == notes
        text = "花园" + "e" * (2 * letters - 2)
        assert len(said(lambda text=text: corpus_bleu([text], [[text]]))) == notes
    many = [ENGLISH] * 500
    (note,) = said(lambda: rouge_scores([*many, "中文"], [*many, ENGLISH]))
    assert "0.0 % of the letters of references" in note.replace("those of ", "the letters of ") and "1 of 1,002 texts" in note
    assert len(said(lambda: corpus_bleu([*many, "中文"], [[*many, ENGLISH]]))) == 1


@pytest.mark.parametrize("language", UNSPACED)
def test_sentences_that_are_not_cut(language):
    """Near-equal lines share no word. Tibetan's syllables are parted by a mark, which no tokenizer but char takes for one."""
    text = UNSPACED[language]
    calls = {
        "BLEU (13a)": lambda: corpus_bleu([text], [[text]]),
        "BLEU (intl)": lambda: corpus_bleu([text, ENGLISH], [[text, ENGLISH]], tokenize="intl"),
        "BLEU (none)": lambda: corpus_bleu([ENGLISH], [[text]], tokenize="none"),
        "METEOR (none)": lambda: meteor_score([text], [text]),
        "chrF2++": lambda: corpus_chrf([text], [[text]], word_order=2),
        "SQuAD's F1": lambda: answer_scores([text], [text]),
    }
    if language == "Tibetan":
        del calls["BLEU (intl)"]
    for who, call in calls.items():
        (note,) = said(call)
        assert note.startswith(f"{who} takes whole sentences for words: ") and "of scripts without spaces" in note
    for call in (
        lambda: corpus_bleu([text], [[text]], tokenize="char"),
        lambda: meteor_score([text], [text], tokenize="char"),
        lambda: corpus_chrf([text], [[text]]),
        lambda: corpus_bleu([list(text)], [[list(text)]], tokenize="ids"),
        lambda: meteor_score([list(text)], [[list(text)]]),
    ):
        assert said(call) == []


def test_tokenizers_of_another_language():
    """zh leaves Thai together, and of Japanese the kana, which are words or endings; MeCab of Japanese knows no Thai."""
    for tokenize, notes in (("zh", {"Thai", "Khmer"}), ("ja-mecab", {"Thai", "Khmer"})):
        for language in ("Chinese", "Japanese", "Thai", "Khmer"):
            found = said(lambda how=tokenize, text=UNSPACED[language]: corpus_bleu([text], [[text]], tokenize=how))
            assert len(found) == (language in notes), (tokenize, language, found)


def test_texts_that_fit():
    hypotheses, references = word_pairs(200)
    hypotheses += ["", "!?", "😀 …", *SPACED.values(), *SEGMENTED.values()]
    references += ["", "。", "😀", *SPACED.values(), *SEGMENTED.values()]
    for call in (
        lambda: corpus_bleu(hypotheses, [references]),
        lambda: corpus_bleu(hypotheses, [references], tokenize="none"),
        lambda: corpus_chrf(hypotheses, [references], word_order=2),
        lambda: meteor_score(hypotheses, references),
        lambda: answer_scores(hypotheses, references),
        lambda: rouge_scores(hypotheses, references, tokenize="unicode"),
        lambda: rouge_scores([ENGLISH] * 80, [ENGLISH.replace("quick", "naïve")] * 2 + [ENGLISH] * 78),  # a letter in 2,000
        lambda: rouge_scores([ENGLISH, "", "…"], ["", "!", ENGLISH]),
    ):
        assert said(call) == []
    for text in SEGMENTED.values():
        assert said(lambda text=text: corpus_bleu([text], [[text]], tokenize="none")) == []


@pytest.mark.parametrize("count", [99, 100])
def test_tokenized_text_is_noticed_as_sacrebleu_notices_it(count, caplog):
    sacrebleu = pytest.importorskip("sacrebleu")
    hypotheses, references = ["words , in tokens ."] * count + ["words."] * 9, ["words, in tokens."] * (count + 9)
    for tokenize, force in (("13a", False), ("intl", False), ("13a", True)):
        caplog.clear()
        sacrebleu.BLEU(tokenize=tokenize, force=force).corpus_score(hypotheses, [references])
        notes = said(lambda how=tokenize, force=force: corpus_bleu(hypotheses, [references], tokenize=how, force=force))
        assert bool(notes) == bool(caplog.records) == (count == 100 and not force)
        assert all(note.startswith("100 hypotheses end in a tokenized period (' .')") for note in notes)
    assert said(lambda: corpus_bleu(hypotheses, [references], tokenize="none")) == []
    assert Bleu(force=True).signature(Bleu().statistics(["a"], [["a"]])) == Bleu().signature(Bleu().statistics(["a"], [["a"]]))


@pytest.mark.filterwarnings("ignore:.* are words, not the empty answer:UserWarning")
def test_no_answer_in_words():
    hypotheses = ["Unanswerable.", "N/A", "Paris", "the cat", "no answer", ""]
    references = [["", None, "Paris", "cat", "unanswerable", "N/A"], [None] * 6]
    (note,) = said(lambda: answer_scores(hypotheses, references))
    assert "3 of 6 hypotheses say so, and 4 questions without an answer are wrong by that alone" in note
    assert "'na', 'unanswerable', 'no answer'" in note and "--no-answer na unanswerable 'no answer'" in note
    scores = answer_scores(hypotheses, references)
    assert scores["f1"].value == scores["exact_match"].value == pytest.approx(100 / 3)
    told = {"no_answer": ("unanswerable", "n/a", "No answer!", "N/A")}
    mapped = answer_scores(hypotheses, references, **told)
    assert said(lambda: answer_scores(hypotheses, references, **told)) == []
    assert [score.value for score in mapped.values()] == [100, 100]
    assert mapped["f1"].parts == {"has_answer": 100.0, "no_answer": 100.0, "answerable": 2}
    assert mapped["f1"].signature == "nrefs:1|norm:squad|version:2.0|no_answer:unanswerable,na,no answer"
    some = answer_scores(hypotheses, references, no_answer=["unanswerable"])
    assert some["f1"].value == pytest.approx(100 * 3 / 6) and some["f1"].signature.endswith("|no_answer:unanswerable")
    # A text that holds such words and more is another answer; an answer that is one is right as it is.
    assert answer_scores(["unanswerable question"], [None], no_answer=["unanswerable"])["f1"].value == 0
    assert said(lambda: answer_scores(["none"] * 9, ["None."] * 9)) == []
    assert len(said(lambda: answer_scores(["none"] * 2 + ["a cat"] * 18, ["nine"] * 2 + ["cat"] * 18))) == 1  # one in ten
    assert said(lambda: answer_scores(["none"] + ["a cat"] * 99, ["nine"] + ["cat"] * 99)) == []
    assert said(lambda: answer_scores(["none"], ["nine"], version="1.1")) == []


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: Answers(no_answer="unanswerable"), TypeError, "got one string: put 'unanswerable' into a list"),
        (lambda: Answers(no_answer=["the"]), ValueError, "'the' normalises to nothing"),
        (lambda: Answers(version="1.1", no_answer=["n/a"]), ValueError, "version='1.1': there each question has an answer"),
    ],
)
def test_mappings_that_say_nothing_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_counts_of_batches_add_up():
    """The share is that of all; 60 and 60 lines that end in " ." are 120; each note once."""
    notes, whole = Notes(), Notes()
    texts = ["a .", ENGLISH] * 60, ["a .", UNSPACED["Chinese"]] * 60
    for part in texts:
        Bleu().statistics(part, [part], notes=notes)
        assert ("tokenized" in notes.sentences()) == (part is texts[1])
    Bleu().statistics(texts[0] + texts[1], [texts[0] + texts[1]], notes=whole)
    assert notes.sentences() == whole.sentences() and len(notes.sentences()) == 2
    assert "120 hypotheses" in notes.sentences()["tokenized"]
    other = Notes()
    Rouge("rouge1").statistics([ENGLISH], [[ENGLISH]], notes=other)
    assert other.sentences() == {}


@pytest.fixture(params=[2, 1000])
def files(request, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.commands.score_texts.BATCH", request.param)

    def written(**texts: list[str]) -> list[str]:
        for name, lines in texts.items():
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return [str(tmp_path / name) for name in texts]

    return written


@pytest.mark.parametrize("score", ["bleu", "rouge", "meteor", "chrf --word-order 2", "f1"])
def test_the_command_says_it_once(files, score):
    h, r = files(h=[UNSPACED["Chinese"], ENGLISH] * 3, r=[UNSPACED["Chinese with a brand"], ENGLISH] * 3)
    name, *options = score.split()
    told = command(name, h, r, *options, "--json", main=main)
    assert told.code == 0 and told.err.count("note: ") == 1 == told.err.count("\n") and json.loads(told.out)["examples"] == 6
    assert "the letters of hypotheses" in told.err and "Warning" not in told.err
    systems = command(name, "--system", f"a={files(a=[ENGLISH] * 6)[0]}", "--system", f"b={h}", r, *options, main=main)
    assert systems.err.count("note: ") == 1 and systems.err.startswith("note: a: ")


@pytest.mark.parametrize("tokenize", ["zh", "char", "ja-mecab", "ko-mecab"])
@pytest.mark.parametrize("score", ["bleu", "rouge", "meteor"])
def test_the_way_on_of_the_command(files, score, tokenize):
    h, r = files(h=[UNSPACED["Japanese"]], r=[UNSPACED["Japanese"].replace("静か", "すぐ")])
    told = command(score, h, r, "--tokenize", tokenize, "--json", main=main)
    (first, *_) = json.loads(told.out)["scores"]
    assert told.err == "" and first["value"] > 0.3 and f"|tok:{tokenize}" in first["signature"]


def test_no_answer_of_the_command(files):
    h, r = files(h=["unanswerable", "a cat", "N/A"], r=["", "cat", "no answer"])
    told = command("f1", h, r, main=main)
    assert told.code == 0 and "note: 'na', 'no answer', 'unanswerable' are words" in told.err and "F1 = 33.33" in told.out
    told = command("f1", h, r, "--no-answer", "unanswerable", "n/a", "No answer", main=main)
    assert told.err == "" and "F1 = 100.00" in told.out and "|no_answer:unanswerable,na,no answer" in told.out
    told = command("f1", "--no-answer", "unanswerable", h, r, main=main)
    assert told.code == 2 and "files come before --no-answer" in told.err


def test_tokenized_text_of_the_command(files):
    (h,) = files(h=["a few words ."] * 101)
    for options, notes in (((), 1), (("--force",), 0), (("--tokenize", "none"), 0)):
        told = command("bleu", h, h, *options, main=main)
        assert told.err.count("note: 101 hypotheses end in a tokenized period") == notes, told.err
