"""The prefix and encoder caches in the engine: what is shared is right, what differs is never shared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from executor_service.engine.block_manager import BlockManager, IntegrityError
from executor_service.engine.encoder_cache import EncoderCache
from executor_service.engine.messages import SamplingParams
from executor_service.engine.prefix_digests import extend_digests
from executor_service.engine.request import EngineItem, Request
from registry import ItemLayout, PlaceholderRange, Run
from tests.executor_service.conftest import Bench, boot_engine, picture

BLOCK = 4
TEXT = "Some words that go before the picture <image> and rather a lot of words that come after it, I think."


@pytest.fixture
def bench(checkpoint, reference) -> Iterator[Bench]:
    """A fresh engine: its caches are empty."""
    bench = Bench(checkpoint, boot_engine(checkpoint, block_size=BLOCK, max_num_batched_tokens=64), reference)
    yield bench
    bench.engine.check_integrity()
    assert bench.engine.load.num_used_blocks == 0


def ask(bench: Bench, number: int, text: str, pictures: list[Image.Image], **sampling: object) -> Request:
    """A request whose items have the content digests that the front would give them."""
    request = bench.request(number, text, pictures, **sampling)
    for item in request.items:
        item.content_digest = hashlib.sha256(item.tensors["pixel_values"].numpy().tobytes()).digest()
    return request


def counters(bench: Bench) -> tuple[int, int, int]:
    counts = bench.engine.scheduler.counters
    return counts.num_encoded_items, counts.num_encoder_cache_hits, counts.num_cached_tokens


def test_the_same_request_again_computes_next_to_nothing(bench: Bench) -> None:
    first, second = (ask(bench, number, TEXT, [picture(1)]) for number in (1, 2))
    expected = bench.expected(first)
    assert bench.run([first])[1] == expected
    assert counters(bench) == (1, 0, 0)
    assert bench.run([second])[2] == expected
    cached = (second.num_prompt_tokens - 1) // BLOCK * BLOCK
    assert second.num_cached_tokens == cached
    assert counters(bench) == (1, 0, cached)


def test_a_second_turn_continues_from_the_first_answer(bench: Bench) -> None:
    first = ask(bench, 1, TEXT, [picture(1)], max_tokens=20)
    bench.run([first])
    second = ask(bench, 2, TEXT, [picture(1)])
    turn = [*first.token_ids[: first.num_tokens], *bench.family.ctx.tokenizer("And now?")["input_ids"]]
    follow_up = Request(3, turn, second.items, second.sampling, 2048)
    expected = bench.expected(follow_up)
    assert bench.run([follow_up])[3] == expected
    # The first answer's last token was never computed.
    assert follow_up.num_cached_tokens == (first.num_tokens - 1) // BLOCK * BLOCK
    assert bench.engine.scheduler.counters.num_encoded_items == 1


def test_two_pictures_never_share(bench: Bench) -> None:
    """Equal token ids throughout; only the content digest tells them apart."""
    first, second = ask(bench, 1, TEXT, [picture(1)]), ask(bench, 2, TEXT, [picture(2)])
    assert first.token_ids[: first.num_prompt_tokens].tolist() == second.token_ids[: second.num_prompt_tokens].tolist()
    expected = [bench.expected(first), bench.expected(second)]
    assert bench.run([first])[1] == expected[0]
    assert bench.run([second])[2] == expected[1]
    assert second.num_cached_tokens == first.items[0].placeholder.offset // BLOCK * BLOCK
    assert bench.engine.scheduler.counters.num_encoded_items == 2


def test_the_order_of_pictures_counts(bench: Bench) -> None:
    pictures = [picture(1), picture(2)]
    requests = [ask(bench, n, "<image><image> which?", p) for n, p in enumerate((pictures, pictures[::-1]))]
    expected = [bench.expected(request) for request in requests]
    assert [bench.run([request])[n] for n, request in enumerate(requests)] == expected
    assert requests[1].num_cached_tokens <= BLOCK
    assert counters(bench)[:2] == (2, 2)


def test_one_batch_encodes_a_picture_once(bench: Bench) -> None:
    requests = [ask(bench, number, f"{number} <image> {'so ' * number}?", [picture(1)]) for number in range(8)]
    outputs = bench.run(requests)
    for request in requests:
        assert outputs[request.request_id] == bench.expected(request)
    assert counters(bench)[:2] == (1, 7)


def test_items_without_a_digest_share_nothing(bench: Bench) -> None:
    requests = [bench.request(number, TEXT, [picture(1)]) for number in (1, 2)]
    for request in requests:
        assert bench.run([request])[request.request_id] == bench.expected(request)
    assert counters(bench) == (2, 0, 0)


def test_prefixes_and_features_under_shortage(checkpoint, reference) -> None:
    """Preemption, eviction of shared blocks and of features: the answers stay transformers'."""
    bytes_per_block = 2 * 2 * BLOCK * 2 * 16 * 8
    booted = boot_engine(
        checkpoint, max_model_len=160, block_size=BLOCK, kv_cache_memory=50 * bytes_per_block,
        encoder_cache_memory=2 * 16 * 64 * 8, max_num_batched_tokens=48,
    )  # fmt: skip
    bench = Bench(checkpoint, booted, reference)
    requests = [
        ask(bench, n, "<image> and <image>" + " word" * (n % 4), [picture(n % 3), picture(n % 2)], max_tokens=25)
        for n in range(12)
    ]
    outputs = bench.run(requests)
    assert bench.engine.scheduler.counters.num_preemptions > 0
    assert bench.engine.scheduler.counters.num_encoder_cache_hits > 0
    for request in requests:
        assert outputs[request.request_id] == bench.expected(request)


def test_prefix_caching_can_be_switched_off(checkpoint, reference) -> None:
    bench = Bench(checkpoint, boot_engine(checkpoint, prefix_caching=False), reference)
    for number in (1, 2):
        request = ask(bench, number, TEXT, [picture(1)])
        assert bench.run([request])[number] == bench.expected(request)
        assert request.num_cached_tokens == 0
    assert counters(bench) == (1, 1, 0)


def test_a_cache_too_small_for_one_item_ends_the_boot(checkpoint) -> None:
    with pytest.raises(Exception, match="holds 15 features, the largest item has 16; raise it to 8192"):
        boot_engine(checkpoint, encoder_cache_memory=15 * 64 * 8)


def test_resumption_goes_on_as_if_nothing_had_happened(bench: Bench) -> None:
    whole = ask(bench, 1, TEXT, [picture(1)], max_tokens=16, temperature=1.0, seed=5)
    tokens = bench.run([whole])[1]
    for given in (1, 7, 15):
        begun = ask(bench, 10 + given, TEXT, [picture(1)], max_tokens=16, temperature=1.0, seed=5)
        resumed = Request(
            begun.request_id, begun.token_ids[: begun.num_prompt_tokens], begun.items, begun.sampling, 2048,
            output_token_ids=tokens[:given],
        )  # fmt: skip
        assert bench.run([resumed])[resumed.request_id] == tokens[given:]


# --- the parts alone ----------------------------------------------------------------------------------


def make_item(offset: int, length: int, content: str | None) -> EngineItem:
    digest = None if content is None else hashlib.sha256(content.encode()).digest()
    return EngineItem(PlaceholderRange(offset, length), "image", ItemLayout((Run(7, length),), {}), {},
                      content_digest=digest)  # fmt: skip


def make_request(number: int, token_ids: list[int], *items: EngineItem) -> Request:
    return Request(number, token_ids, list(items), SamplingParams(max_tokens=4), 1000)


def digests(request: Request) -> list[bytes]:
    extend_digests(request, BLOCK, request.num_tokens // BLOCK)
    return request.block_digests


def test_a_block_is_known_by_everything_before_it() -> None:
    ids = [1, 2, 3, 4, 7, 7, 7, 7, 7, 7, 5, 6]
    base = digests(make_request(0, ids, make_item(4, 6, "cat")))
    assert digests(make_request(0, ids, make_item(4, 6, "cat"))) == base
    assert digests(make_request(0, [9, *ids[1:]], make_item(4, 6, "cat")))[2] != base[2]
    other = digests(make_request(0, ids, make_item(4, 6, "dog")))
    assert [a == b for a, b in zip(base, other, strict=True)] == [True, False, False]
    moved = digests(make_request(0, ids, make_item(5, 5, "cat")))
    assert [a == b for a, b in zip(base, moved, strict=True)] == [True, False, False]
    assert digests(make_request(0, ids)) != base


def test_integrity_check_notices_writing_to_a_shared_block() -> None:
    blocks = BlockManager(8, BLOCK)
    first, second = make_request(1, [1] * 9), make_request(2, [1] * 9)
    blocks.reserve(first, 9)
    first.num_computed_tokens = 9
    blocks.register(first)
    second.num_computed_tokens = blocks.share_prefix(second)
    assert second.block_table == first.block_table[:2]
    blocks.check_integrity([first, second])
    second.num_computed_tokens = 4
    with pytest.raises(IntegrityError, match="which is shared"):
        blocks.check_integrity([first, second])


def test_a_prefix_is_forgotten_from_its_end() -> None:
    blocks = BlockManager(4, BLOCK)
    first = make_request(1, list(range(16)))
    blocks.reserve(first, 16)
    first.num_computed_tokens = 16
    blocks.register(first)
    blocks.free(first)
    other = make_request(2, [99] * 8)
    blocks.reserve(other, 8)
    again = make_request(3, list(range(16)))
    assert blocks.share_prefix(again) == 8


def test_the_encoder_cache_keeps_to_its_capacity_and_forgets_the_oldest() -> None:
    cache = EncoderCache(10)
    items = {name: make_item(0, 4, name) for name in "abc"}
    for name in "ab":
        assert cache.acquire(items[name])
        items[name].features = torch.ones(4, 1)
    assert cache.room == 2
    for name in "ba":
        cache.release(items[name])
    assert (cache.room, cache.num_features) == (10, 8)
    assert cache.acquire(items["c"])
    assert cache.find(items["b"]) is None
    assert cache.find(items["a"]) is not None
    cache.check_integrity(items.values())
    cache.release(items["c"])  # never encoded: nothing to keep
    assert cache.find(items["c"]) is None
    stray = make_item(0, 4, "x")
    stray.encoded.num_users = 1
    with pytest.raises(IntegrityError, match="does not know"):
        cache.check_integrity([stray])
