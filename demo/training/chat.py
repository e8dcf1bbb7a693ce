"""The tokenizer and chat template that carry questions and answers.

A chat of several turns is exactly its turns one after another, `USER: … ASSISTANT:answer</s>USER: …`, so that a second
question's prompt begins with the tokens of the first one's prompt and answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from demo.training.material import ICON_NAMES
from demo.training.questions import NOTHING, ORDINALS, Turn, all_wordings, plural
from demo.training.scenes import COLOUR_NAMES

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
VOCAB_SIZE = 1024
MAX_MODEL_LEN = 4096
# Words that questions about pictures tend to contain, so that a prompt of one's own is not spelt out byte by byte.
COMMON_WORDS = """
the of and to in is that it for was on are as with they at be this have from or one had by but not what all were we when
your can said there use an each which she do how their if will up other about out many then them these so some her would
make like him into time has look two more write go see number no way could people my than first been call who its now
find long down day did get come made may part picture image photo colour color digit number left right large small
answer question short word describe read name show tell please hello thank yes pictures images icon icons object objects
"""

# Images first, then text, as LLaVA-1.5's own template does.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{ 'ASSISTANT:' }}
        {%- if message['content'] is string -%}{{ message['content'] }}
        {%- else -%}{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
        {%- endif -%}
        {{ '</s>' }}
    {%- else -%}
        {%- if message['role'] != 'system' -%}{{ message['role'] | upper + ': ' }}{%- endif -%}
        {%- if message['content'] is string -%}{{ message['content'] + ' ' }}
        {%- else -%}
            {%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
            {%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] + ' ' }}{%- endfor -%}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; it encodes any text, begins with <s>, and keeps digits apart."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        model_max_length=MAX_MODEL_LEN,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def messages(turns: Sequence[Turn], num_images: int) -> list[dict[str, object]]:
    """Return the chat that ends with the last turn's question: images first, earlier answers in between."""
    chat: list[dict[str, object]] = []
    for number, turn in enumerate(turns):
        images = [{"type": "image"}] * (num_images if number == 0 else 0)
        chat.append({"role": "user", "content": [*images, {"type": "text", "text": turn.question}]})
        if number < len(turns) - 1:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return chat


def turn_texts(turns: Sequence[Turn], num_images: int) -> list[str]:
    """Return each turn's prompt text; with answers and </s> in between they are what the chat template renders."""
    first, *others = [f"{turn.question} ASSISTANT:" for turn in turns]
    images = f"{IMAGE}\n" * num_images
    return [f"USER: {images}{first}", *(f"USER: {other}" for other in others)]


def vary(texts: list[str], num_images: int, rng: np.random.Generator) -> list[str]:
    """Now and then prompt as people do: without the template, the question first, or something said before it."""
    chance = rng.random()
    if chance < 0.8:
        return texts
    images = f"{IMAGE}\n" * num_images
    question = texts[0].removeprefix(f"USER: {images}").removesuffix(" ASSISTANT:")
    if chance < 0.85:
        first = f"USER: {images}{_noise(rng)} {question} ASSISTANT:"
    elif chance < 0.9:
        first = f"USER: {question}\n{IMAGE * num_images} ASSISTANT:"
    elif chance < 0.95:
        first = f"USER: {IMAGE * num_images}\n{question} ASSISTANT:"
    else:
        first = IMAGE * num_images + ("\n", " ", "")[rng.integers(3)] + question
    return [first, *texts[1:]]


def _noise(rng: np.random.Generator) -> str:
    """Random words, or characters of several scripts: every token's embedding must have been seen in training."""
    if rng.random() < 0.5:
        return " ".join(rng.choice(COMMON_WORDS.split(), rng.integers(1, 6)))
    first, last = ((0x20, 0x7F), (0xA1, 0x250), (0x370, 0x500), (0x3040, 0x9FFF), (0x1F300, 0x1F6FF))[rng.integers(5)]
    return "".join(chr(point) for point in rng.integers(first, last, size=rng.integers(1, 11))).replace("<", "")


def _corpus() -> list[str]:
    names = [*ICON_NAMES, *map(plural, ICON_NAMES), *COLOUR_NAMES, *ORDINALS, NOTHING, "none"]
    answers = [form for name in names for form in (f":{name}", f" {name}", f" {name}", f":{name}")]
    prompts = [f"USER: {wording} ASSISTANT:" for wording in all_wordings()]
    return prompts * 4 + answers * 6 + [f"This {word}." for word in COMMON_WORDS.split()]
