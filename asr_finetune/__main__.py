"""`python -m asr_finetune` is `asr-finetune`."""

from asr_finetune.cli import main

if __name__ == "__main__":
    main()
