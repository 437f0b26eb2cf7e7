"""TRL's SFTTrainer, made private: supervised fine-tuning without packing.

`PrivateTrainerMixin` makes any subclass of transformers' Trainer private. TRL's trainer computes a loss of its own for
a batch, so the loss for each example is given. By default a tiny GPT-2 with random weights and a vocabulary of words
learns made-up lines, so that nothing is downloaded.

    python examples/trl_sft.py
    python examples/trl_sft.py --model gpt2 --steps 500 --batch-size 256 --output model
"""

import argparse
import tempfile

import datasets
import tokenizers
import torch
import transformers
import trl

from dpkernels.interop.trainer import PrivacyArguments, PrivateTrainerMixin, losses_per_example

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder or hub id of a checkpoint; default: a tiny GPT-2, random weights")
parser.add_argument("--epsilon", type=float, default=8.0)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--output", help="folder for checkpoints and the model; default: a temporary one")
options = parser.parse_args()

texts = [f"patient {number % 10} was seen on day {number % 7} of the week" for number in range(400)]

if options.model:
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
else:
    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted({word for text in texts for word in text.split()})]
    known = tokenizers.models.WordLevel(
        {word: number for number, word in enumerate(words)}, unk_token="<unk>"
    )
    of_words = tokenizers.Tokenizer(known)
    of_words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=of_words, **special)
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(words), **sizes, **ids))


class PrivateSFTTrainer(PrivateTrainerMixin, trl.SFTTrainer):
    """TRL's trainer with a private step."""


with tempfile.TemporaryDirectory() as temporary:
    arguments = trl.SFTConfig(
        output_dir=options.output or temporary,
        packing=False,  # a packed row would hold several examples, and is refused
        per_device_train_batch_size=16,
        gradient_accumulation_steps=max(options.batch_size // 16, 1),
        max_steps=options.steps,
        learning_rate=1e-2,
        logging_steps=4,
        bf16=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=[],
    )
    trainer = PrivateSFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"text": text} for text in texts]),
        processing_class=tokenizer,
        privacy=PrivacyArguments(
            target_epsilon=options.epsilon, target_delta=0.1 / len(texts), max_grad_norm=1.0
        ),
        compute_loss_per_example=losses_per_example,
    )
    trainer.train()
    print(f"epsilon = {trainer.state.log_history[-1]['epsilon']:.3f} at delta = {0.1 / len(texts):.1e}")
    if options.output:
        trainer.save_model()
