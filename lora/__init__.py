"""Small trainable parts on a frozen network: LoRA and its kin. Nothing is here yet."""
