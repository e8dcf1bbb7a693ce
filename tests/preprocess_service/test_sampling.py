"""Sampling parameters on their way to the executor, and what comes back for them, before a stand-in executor."""

from __future__ import annotations

from diptych.client import AsyncClient, Prompt
from preprocess_service.planning import Checkpoint
from tests.preprocess_service.serving import words
from tests.stand_in_executor import StandInExecutor


async def test_prompt_logprobs_come_before_the_answer(client: AsyncClient, executor: StandInExecutor) -> None:
    pieces = [piece async for piece in client.stream(Prompt("some words"), max_tokens=2, prompt_logprobs=1)]
    prompt = list(executor.requests[-1].start.prompt_token_ids)
    assert [entry.token_id for piece in pieces for entry in piece.prompt_logprobs] == prompt[1:]
    first = next(index for index, piece in enumerate(pieces) if piece.token_ids)
    assert not any(piece.prompt_logprobs for piece in pieces[first + 1 :])
    answer = await client.generate(Prompt("some words"), max_tokens=2, prompt_logprobs=1)
    assert [(entry.token_id, entry.logprob) for entry in answer.prompt_logprobs] == [(t, -2.5) for t in prompt[1:]]
    assert answer.logprobs == []


async def test_every_parameter_reaches_the_executor(client: AsyncClient, executor: StandInExecutor) -> None:
    """As it was set, and unset where it was not."""
    options = {
        "min_p": 0.25, "prompt_logprobs": 0, "repetition_penalty": 1.5, "presence_penalty": -0.5,
        "frequency_penalty": 0.5, "logit_bias": {3: 1.5, 4: -100.0}, "min_tokens": 1, "bad_words": [[7, 8]],
    }  # fmt: skip
    await client.generate(Prompt("x"), max_tokens=1, **options)  # type: ignore[arg-type]
    sampling = executor.requests[-1].start.sampling
    for name in (
        "min_p",
        "prompt_logprobs",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "min_tokens",
    ):
        assert sampling.HasField(name)
        assert getattr(sampling, name) == options[name]
    assert dict(sampling.logit_bias) == options["logit_bias"]
    assert [list(sequence.token_ids) for sequence in sampling.bad_words] == [[7, 8]]
    await client.generate(Prompt("x"))
    assert executor.requests[-1].start.sampling.ListFields() == []


async def test_bad_words_become_token_sequences(
    client: AsyncClient, executor: StandInExecutor, checkpoint: Checkpoint
) -> None:
    """Each word as a text begins with it and as it follows a space; a leading space of its own is not doubled."""
    await client.generate(Prompt("x"), max_tokens=1, bad_words=["fox", " dog", [9], "fox", "図"])
    found = [list(sequence.token_ids) for sequence in executor.requests[-1].start.sampling.bad_words]
    expected = [words(checkpoint, text) for text in ("fox", " fox", "dog", " dog", "図", " 図")]
    assert found == [[9], *expected]
    for text in (" ", "  "):
        await client.generate(Prompt("x"), max_tokens=1, bad_words=[text])
        found = [list(sequence.token_ids) for sequence in executor.requests[-1].start.sampling.bad_words]
        assert words(checkpoint, text) in found


async def test_stop_strings_wait_for_min_tokens(
    client: AsyncClient, executor: StandInExecutor, checkpoint: Checkpoint
) -> None:
    text = "a STOP b STOP c"
    script = words(checkpoint, text)
    executor.script = lambda start: script
    first = next(n for n in range(1, len(script)) if "STOP" in checkpoint.tokenizer.decode(script[:n]))
    for min_tokens, expected in ((0, "a "), (first - 1, "a "), (first, "a STOP b "), (len(script), text)):
        answer = await client.generate(Prompt("x"), stop=["STOP"], min_tokens=min_tokens)
        assert answer.text == expected, min_tokens
        assert answer.final is not None
        assert answer.final.stop == (None if expected == text else "STOP")
