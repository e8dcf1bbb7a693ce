"""Batches of requests: scenes, questions, tokens and tiles, drawn in worker processes from a seed and a number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from demo.training.anyres import NEWLINE, PATCHES, TILE_SIDE, Tiles, cut
from demo.training.chat import IMAGE, turn_texts, vary
from demo.training.material import Material
from demo.training.questions import SEVERAL, SINGLE, TWO_TURNS, TYPES, Ask, Turn, random_kinds, random_turns
from demo.training.scenes import MAX_OBJECTS, Painter, Scene, Thing

UNSEEN = -1
TEXT = -1
"""Stands in `sources` for an ordinary token."""
NUM_TURNS, NUM_TURNS_WEIGHTS = [1, 2, 4, 6, 8], [0.15, 0.2, 0.25, 0.25, 0.15]
NUM_PICTURES, NUM_PICTURES_WEIGHTS = [2, 3, 4], [0.5, 0.35, 0.15]
MAX_OBJECTS_OF_SEVERAL = 3
BATCHES_PER_POOL = 4
SEVERAL_EVERY = 3
SHRINK = 0.85
EVERY_DIGIT = "every held-out digit, alone"
EXAM_BATCH, EXAM_BATCH_OF_SEVERAL = 50, 25


@dataclass(frozen=True)
class Batch:
    """Requests side by side, padded on the right, where causal attention never looks from."""

    tiles: Tensor
    """[tiles, height, width, RGB], uint8, of all pictures."""
    boxes: Tensor
    """[tiles, objects, 5]: class + 1, or 0 for no object, then left, top, right, bottom in pixels of the tile."""
    neighbours: Tensor
    """[tiles, objects, 2]: class + 1 of the next object to the left and right, 0 for none, UNSEEN where a tile of a
    part of the picture does not tell."""
    input_ids: Tensor
    sources: Tensor
    """For every token: TEXT, NEWLINE, or tile * PATCHES + patch."""
    answer_at: Tensor
    """Flat positions whose next token is an answer's."""
    answer_ids: Tensor
    answer_rows: Tensor

    def to(self, device: torch.device) -> Batch:
        """Copy to a device."""
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def pin_memory(self) -> Batch:
        """Copy into memory that a GPU reads directly."""
        return Batch(*(getattr(self, field.name).pin_memory() for field in fields(self)))


@dataclass(frozen=True)
class Request:
    """Scenes, the turns about them, and the prompt of each turn."""

    scenes: list[Scene]
    turns: list[Turn]
    texts: list[str]


class Collator:
    """Turns requests into batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.encode = tokenizer.backend_tokenizer.encode
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.image = tokenizer.convert_tokens_to_ids(IMAGE)

    def __call__(self, requests: Iterable[Request]) -> Batch:
        """Collate a few requests."""
        tiles: list[Tiles] = []
        boxes: list[NDArray[np.float32]] = []
        neighbours: list[NDArray[np.int64]] = []
        rows = []
        num_tiles = 0
        for request in requests:
            sources = []
            for scene in request.scenes:
                picture = cut(scene.picture)
                offset = np.where(picture.sources == NEWLINE, 0, num_tiles * PATCHES)
                sources.append(picture.sources + offset)
                tiles.append(picture)
                boxes.append(_boxes(picture, scene.things))
                neighbours.append(_neighbours(picture, scene.things))
                num_tiles += len(picture.pixels)
            rows.append(self._row(request, sources))
        pixels = torch.from_numpy(np.concatenate([picture.pixels for picture in tiles]))
        where = [torch.from_numpy(np.concatenate(arrays)) for arrays in (boxes, neighbours)]
        return Batch(pixels, *where, *self._pad(rows))

    def _row(self, request: Request, sources: list[NDArray[np.int64]]) -> tuple[list[int], list[int], list[bool]]:
        """Return token ids, sources, and which tokens are answers."""
        ids, where, answers = [self.bos], [TEXT], [False]
        pictures = iter(sources)
        for text, turn in zip(request.texts, request.turns, strict=True):
            for token in self._ids(text):
                stands_for = next(pictures).tolist() if token == self.image else [TEXT]
                ids += [token] * len(stands_for)
                where += stands_for
                answers += [False] * len(stands_for)
            reply = [*self._ids(turn.answer), self.eos]
            ids += reply
            where += [TEXT] * len(reply)
            answers += [True] * len(reply)
        return ids, where, answers

    def _ids(self, text: str) -> list[int]:
        return list(self.encode(text, add_special_tokens=False).ids)

    def _pad(self, rows: list[tuple[list[int], list[int], list[bool]]]) -> list[Tensor]:
        width = max(len(ids) for ids, _, _ in rows)
        width += -width % 8
        input_ids = np.full((len(rows), width), self.pad)
        sources = np.full((len(rows), width), TEXT)
        answers = np.zeros((len(rows), width), bool)
        for number, (ids, where, is_answer) in enumerate(rows):
            input_ids[number, : len(ids)] = ids
            sources[number, : len(ids)] = where
            answers[number, : len(ids)] = is_answer
        at = np.flatnonzero(answers)
        arrays = [input_ids, sources, at - 1, input_ids.ravel()[at], at // width]
        return [torch.from_numpy(array.astype(np.int64)) for array in arrays]


def _boxes(picture: Tiles, things: list[Thing]) -> NDArray[np.float32]:
    """Where the objects are in each tile, a little smaller than drawn."""
    boxes = np.zeros((len(picture.pixels), MAX_OBJECTS, 5), np.float32)
    where = np.array([[thing.x, thing.y, SHRINK * thing.radius] for thing in things]).reshape(-1, 3)
    for tile, view in enumerate(picture.views):
        scale, offset = np.array(view.scale), np.array(view.offset)
        centre, radius = where[:, :2] * scale + offset, where[:, 2:] * scale
        boxes[tile, : len(things), 1:] = np.concatenate([centre - radius, centre + radius], axis=1)
        boxes[tile, : len(things), 0] = [thing.kind + 1 for thing in things]
        outside = (centre + radius < 0).any(1) | (centre - radius > TILE_SIDE).any(1)
        boxes[tile, : len(things)][outside] = 0
    return boxes


def _neighbours(picture: Tiles, things: list[Thing]) -> NDArray[np.int64]:
    """What stands beside each object, told for the first tile alone: it shows the whole picture."""
    neighbours = np.full((len(picture.pixels), MAX_OBJECTS, 2), UNSEEN)
    kinds = [0, *(thing.kind + 1 for thing in things), 0]
    neighbours[0, : len(things)] = list(zip(kinds[:-2], kinds[2:], strict=True))
    return neighbours


class Lessons(Dataset[list[Batch]]):
    """The training batches, a few at a time: requests of similar length share a batch, so that little is padding."""

    def __init__(self, material: Material, collate: Collator, seed: int, num_pools: int, batch_size: int) -> None:
        self.painter, self.collate = Painter(material), collate
        self.seed, self.num_pools, self.batch_size = seed, num_pools, batch_size

    def __len__(self) -> int:
        return self.num_pools

    def __getitem__(self, number: int) -> list[Batch]:
        rng = np.random.default_rng([self.seed, number])
        several = number % SEVERAL_EVERY == SEVERAL_EVERY - 1
        size = self.batch_size // 4 if several else self.batch_size
        # Scenes begin simple and fill up during the first two hundred batches.
        crowd = min(MAX_OBJECTS, 2 + BATCHES_PER_POOL * number // 50)
        requests = [self._request(several, crowd, rng) for _ in range(BATCHES_PER_POOL * size)]
        requests.sort(key=lambda request: sum(_area(scene) for scene in request.scenes))
        batches = [self.collate(requests[i * size : (i + 1) * size]) for i in range(BATCHES_PER_POOL)]
        return [batches[i] for i in rng.permutation(BATCHES_PER_POOL)]

    def _request(self, several: bool, crowd: int, rng: np.random.Generator) -> Request:
        num_pictures = int(rng.choice(NUM_PICTURES, p=NUM_PICTURES_WEIGHTS)) if several else 1
        num_turns = int(rng.choice(NUM_TURNS, p=NUM_TURNS_WEIGHTS))
        most = min(crowd, MAX_OBJECTS_OF_SEVERAL) if several else crowd
        return draw_request(self.painter, rng, num_pictures, num_turns, most)


def _area(scene: Scene) -> int:
    """Stand in for a picture's number of image tokens, roughly."""
    width, height = scene.picture.size
    return min(width, height) * 1000 // max(width, height)


def draw_request(
    painter: Painter, rng: np.random.Generator, num_pictures: int, num_turns: int, max_objects: int
) -> Request:
    """Draw scenes and ask about them; prompts vary in form."""
    while True:
        scenes = [painter.draw(random_kinds(rng, max_objects), rng) for _ in range(num_pictures)]
        if turns := random_turns(scenes, num_turns, rng):
            return Request(scenes, turns, vary(turn_texts(turns, num_pictures), num_pictures, rng))


class Exam(Dataset[Batch]):
    """Questions of one type, about scenes that training never drew; the prompts are the chat template's."""

    def __init__(
        self, material: Material, question_type: str, num_questions: int, seed: int, collate: Collator | None = None
    ) -> None:
        self.painter, self.collate = Painter(material), collate
        self.type, self.num_questions, self.seed = question_type, num_questions, seed
        self.batch_size = EXAM_BATCH_OF_SEVERAL if question_type in SEVERAL else EXAM_BATCH

    def __len__(self) -> int:
        return math.ceil(self.num_questions / self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        if self.collate is None:
            raise TypeError("an exam without a collator has requests, but no batches")
        numbers = range(number * self.batch_size, min((number + 1) * self.batch_size, self.num_questions))
        return self.collate(self.request(index) for index in numbers)

    def request(self, index: int) -> Request:
        """Draw one question; a two-turn chat counts as one."""
        rng = np.random.default_rng([self.seed, index, ([*TYPES, EVERY_DIGIT]).index(self.type)])
        if self.type == EVERY_DIGIT:
            scenes = [self.painter.draw([int(self.painter.material.labels[index])], rng, digit=index)]
            turn = None
            while turn is None:
                turn = SINGLE["read one digit"](scenes, rng)
            turns = [turn]
        else:
            scenes, turns = self._ask(rng)
        return Request(scenes, turns, turn_texts(turns, len(scenes)))

    def _ask(self, rng: np.random.Generator) -> tuple[list[Scene], list[Turn]]:
        ask: Ask | None = {**SINGLE, **SEVERAL}.get(self.type)
        several = self.type in SEVERAL
        while True:
            count = int(rng.choice(NUM_PICTURES, p=NUM_PICTURES_WEIGHTS)) if several else 1
            crowd = MAX_OBJECTS_OF_SEVERAL if several else MAX_OBJECTS
            scenes = [self.painter.draw(random_kinds(rng, crowd), rng) for _ in range(count)]
            if self.type == TWO_TURNS:
                turns = random_turns(scenes, 2, rng)
                if len(turns) == 2:
                    return scenes, turns
            elif ask and (turn := ask(scenes, rng)):
                return scenes, [turn]
