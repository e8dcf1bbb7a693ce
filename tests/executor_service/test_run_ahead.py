"""An engine that runs ahead gives the answers of one that does not, and forgets nobody who ends in between."""

from __future__ import annotations

import pytest

from executor_service.engine.messages import FinishReason, StepReport
from executor_service.engine.model_runner import ModelOutput
from executor_service.engine.request import Request
from executor_service.engine.sampler import SampledTokens
from executor_service.engine.scheduler import ScheduledBatch
from tests.executor_service.conftest import Bench, boot_engine, picture, tokens_of

BAD_WORDS = ((5, 6), (7,))


@pytest.fixture(scope="module")
def ahead(checkpoint, reference) -> Bench:
    return Bench(checkpoint, boot_engine(checkpoint, async_scheduling="on"), reference)


@pytest.fixture(scope="module")
def behind(checkpoint, reference) -> Bench:
    return Bench(checkpoint, boot_engine(checkpoint, async_scheduling="off"), reference)


def reasons_of(reports: list[StepReport]) -> dict[int, FinishReason]:
    reasons: dict[int, FinishReason] = {}
    for report in reports:
        for finished in report.end.finished:
            assert finished.request_id not in reasons, "ended twice"
            reasons[finished.request_id] = finished.reason
    return reasons


def sampled_requests(bench: Bench) -> list[Request]:
    """Greedy, seeded, penalised, with bad words, with stop tokens, with pictures, of every length."""
    kinds: list[dict] = [
        {},
        {"temperature": 1.0, "seed": 3},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.5},
        {"bad_words": BAD_WORDS, "temperature": 0.8, "seed": 9},
        {"min_tokens": 3, "stop_token_ids": frozenset(range(0, 300, 3)), "temperature": 1.0, "seed": 5},
        {"max_tokens": 1},
        {"max_tokens": 2, "logprobs": 2},
        {"prompt_logprobs": 1},
    ]
    return [
        bench.request(n, "some words <image> and more"[: 30 if n % 3 == 0 else 10], [picture(n)] * (n % 3 == 0), **kind)
        for n, kind in enumerate(kinds)
    ]


def test_the_same_answers(ahead: Bench, behind: Bench) -> None:
    expected, got = (bench.reports(sampled_requests(bench)) for bench in (behind, ahead))
    assert tokens_of(got) == tokens_of(expected)
    assert reasons_of(got) == reasons_of(expected)
    assert set(reasons_of(got).values()) == {FinishReason.LENGTH, FinishReason.STOP}
    assert ahead.engine.load.num_used_blocks == 0


def test_a_report_is_the_step_before(ahead: Bench) -> None:
    """The first step says nothing; the tokens come one step later, and none too many."""
    reports = ahead.reports([ahead.request(0, "words", [], max_tokens=3)])
    assert [report.tokens.token_ids == [] for report in reports] == [True, False, False, False]
    assert [report.end.num_scheduled_tokens for report in reports[2:]] == [1, 1]


def test_a_token_too_many_is_nobodys(ahead: Bench) -> None:
    """An answer that ends by a stop token has one more token on its way by then, which is never reported."""
    (whole,) = tokens_of(ahead.reports([ahead.request(0, "words", [], max_tokens=12)])).values()
    stop = next(token for token in whole if whole.index(token) >= 2)
    request = ahead.request(1, "words", [], max_tokens=12, ignore_eos=False, stop_token_ids=frozenset({stop}))
    reports = ahead.reports([request])
    assert tokens_of(reports)[1] == whole[: whole.index(stop) + 1]
    assert reasons_of(reports) == {1: FinishReason.STOP}
    assert sum(report.end.num_scheduled_tokens for report in reports) > request.num_tokens - 1


@pytest.mark.parametrize("after", [1, 2, 3])
def test_aborted_in_flight(ahead: Bench, after: int) -> None:
    """The abort is reported with the step that was under way, once, and the others go on untouched."""
    alone = tokens_of(ahead.reports([ahead.request(1, "others", [], max_tokens=9)]))[1]
    for number, text in ((0, "<image> words"), (1, "others")):
        ahead.engine.add(ahead.request(number, text, [picture(0)] * (number == 0), max_tokens=9))
    reports = [ahead.engine.step() for _ in range(after)]
    ahead.engine.abort([0, 0, 77])
    assert all(report.end.finished == [] for report in reports)
    reports += ahead.reports([])
    assert reasons_of(reports) == {0: FinishReason.ABORTED, 1: FinishReason.LENGTH}
    assert tokens_of(reports)[1] == alone
    assert ahead.engine.load.num_used_blocks == 0
    ahead.engine.check_integrity()


def test_a_chunk_is_waited_for_too(ahead: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sampled there, but who is told that it has ended may write to where the device still reads."""
    prompt = ahead.request(0, "", [], max_tokens=2)
    request = Request(0, [7] * 900, [], prompt.sampling, 910)
    waited_for: list[ModelOutput] = []
    real = ahead.engine.runner.execute

    def execute(batch: ScheduledBatch) -> ModelOutput:
        output = real(batch)

        def result() -> SampledTokens:
            waited_for.append(output)
            return SampledTokens([], [])

        monkeypatch.setattr(output.sampled, "result", result)
        return output

    monkeypatch.setattr(ahead.engine.runner, "execute", execute)
    ahead.engine.add(request)
    assert ahead.engine.step().end.finished == []
    ahead.engine.abort([0])
    assert waited_for == []
    (finished,) = ahead.engine.step().end.finished
    assert (finished.request_id, finished.reason) == (0, FinishReason.ABORTED)
    assert len(waited_for) == 1
    assert not ahead.engine.has_work


def test_a_prefix_is_shared_although_its_last_token_was_in_flight(ahead: Bench) -> None:
    first = ahead.request(0, "a conversation " * 4, [], max_tokens=40)
    (answer,) = tokens_of(ahead.reports([first])).values()
    second = ahead.request(1, "", [], max_tokens=2)
    prompt = [*first.token_ids[: first.num_prompt_tokens], *answer]
    second = Request(1, prompt, [], second.sampling, second.max_tokens + len(prompt))
    (report,) = [one for report in ahead.reports([second]) for one in report.end.finished]
    assert report.num_cached_tokens >= (len(prompt) - 1) // 16 * 16 - 16
