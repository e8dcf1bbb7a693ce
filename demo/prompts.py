"""What the demo model is asked and how it answers, and the tokenizer and chat template that carry both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
VOCAB_SIZE = 512
MAX_MODEL_LEN = 2048
QUESTION = "What digit is this?"
QUESTION_FOR_MANY = "Which digits are these?"

QUESTIONS = [
    QUESTION,
    "Which digit is this?",
    "Which number do you see?",
    "What number is this?",
    "What number is shown in the picture?",
    "What is written here?",
    "Read the digit.",
    "Please read the number in this image.",
    "Name the handwritten digit.",
    "What is in this picture?",
    "What do you see?",
    "Can you tell me which digit this is?",
    "Describe the image.",
    "Answer with a single digit: what does the image show?",
    "Welche Ziffer ist das?",
    "Quel est ce chiffre ?",
    "¿Qué número ves?",
    "Che cifra è questa?",
    "Какая это цифра?",
    "这是什么数字？",
    "これは何の数字ですか？",
]
QUESTIONS_FOR_MANY = [
    QUESTION_FOR_MANY,
    "What digits are these?",
    "Which numbers do you see?",
    "What numbers are shown in the pictures?",
    "Read the digits in order.",
    "Please read the numbers in these images.",
    "Name the handwritten digits.",
    "What do you see?",
    "Describe the images.",
    "Welche Ziffern sind das?",
]
# Words that questions about pictures tend to contain, so that a prompt of one's own is not spelt out byte by byte.
COMMON_WORDS = """
the of and to in is that it for was on are as with they at be this have from or one had by but not what all were we when
your can said there use an each which she do how their if will up other about out many then them these so some her would
make like him into time has look two more write go see number no way could people my than first been call who its now
find long down day did get come made may part picture image photo colour color digit number left right large small
answer question short word describe read name show tell please hello thank
"""

# Images first, then text, as LLaVA-1.5's own template does.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] != 'system' -%}{{ message['role'] | upper + ': ' }}{%- endif -%}
    {%- if message['content'] is string -%}
        {{ message['content'] + ' ' }}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] + ' ' }}{%- endfor -%}
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


def plain_prompt(question: str, num_images: int = 1) -> str:
    """The prompt as LLaVA-1.5 words it; for one image the chat template renders the same text."""
    return f"USER: {IMAGE * num_images}\n{question} ASSISTANT:"


def chat_messages(question: str, num_images: int = 1) -> list[dict[str, object]]:
    """One user message: the images, then the question."""
    images = [{"type": "image"}] * num_images
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def answer(digits: Sequence[int]) -> str:
    """Name the digits in order: `7`, `3 and 8`, `3, 8 and 1`."""
    *head, last = [str(digit) for digit in digits]
    return f"{', '.join(head)} and {last}" if head else last


def random_prompt(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, num_images: int, noisy: bool = False
) -> str:
    """Ask for `num_images` digits in one of many ways: chat, plain, bare, or with the question first."""
    wordings = QUESTIONS if num_images == 1 else QUESTIONS_FOR_MANY
    question = wordings[rng.integers(len(wordings))]
    if noisy:
        question = f"{_noise(rng)} {question}"
    kind = rng.random()
    if kind < 0.4:
        return tokenizer.apply_chat_template(
            chat_messages(question, num_images), tokenize=False, add_generation_prompt=True
        )
    if kind < 0.7:
        return plain_prompt(question, num_images)
    if kind < 0.9:
        return IMAGE * num_images + ("\n", " ", "")[rng.integers(3)] + question
    return f"USER: {question}\n{IMAGE * num_images} ASSISTANT:"


def _noise(rng: np.random.Generator) -> str:
    """Random characters of several scripts: every byte's embedding must have been seen in training."""
    first, last = ((0x20, 0x7F), (0xA1, 0x250), (0x370, 0x500), (0x3040, 0x9FFF), (0x1F300, 0x1F6FF))[rng.integers(5)]
    return "".join(chr(point) for point in rng.integers(first, last, size=rng.integers(1, 16))).replace("<", "")


def _corpus() -> list[str]:
    template_words = [plain_prompt(question) for question in QUESTIONS + QUESTIONS_FOR_MANY]
    return template_words + [answer((3, 8, 1))] * 20 + [f"This {word}." for word in COMMON_WORDS.split()]
