"""Audio bytes to samples: all channels mixed to one, resampled to the rate the checkpoint takes.

The mean of the channels, soxr at its "HQ" setting, and a length rounded up: as `librosa.load` does it.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any, Final

import numpy as np

from diptych.service.errors import InvalidInputError
from preprocess_service.media.decode_errors import mismatch, undecodable
from preprocess_service.media.header_audio import error_text
from preprocess_service.requests import PlannedItem

BLOCK_SAMPLES: Final = 1 << 16


def decode_audio(item: PlannedItem, index: int) -> np.ndarray:
    """float32 [num_samples], of exactly the length the header promised."""
    import soundfile

    assert item.data is not None
    num_samples, rate = item.info.num_samples, item.info.sample_rate
    assert num_samples is not None
    assert rate is not None
    try:
        with soundfile.SoundFile(BytesIO(item.data)) as file:
            if -(-file.frames * rate // file.samplerate) != num_samples:
                raise mismatch(
                    index, f"the audio has {file.frames} samples at {file.samplerate} Hz, its header differs"
                )
            return _resample(_read_mono(file, index), file.samplerate, rate, num_samples)
    except InvalidInputError:
        raise
    except soundfile.SoundFileError as error:
        text = ValueError(error_text(error))
        raise undecodable(index, f"{item.file_format} audio", text) from error


def _read_mono(file: Any, index: int) -> np.ndarray:
    """Block by block: only one channel is ever kept."""
    mono = np.empty(file.frames, dtype=np.float32)
    done = 0
    for block in file.blocks(BLOCK_SAMPLES, dtype="float32", always_2d=True):
        mono[done : done + len(block)] = block.mean(axis=1)
        done += len(block)
    if done != len(mono):
        raise mismatch(index, f"the audio ends after {done} samples, its header says {len(mono)}")
    return mono


def _resample(samples: np.ndarray, from_rate: int, to_rate: int, num_samples: int) -> np.ndarray:
    """The resampler rounds its length to the nearest, the contract rounds it up: one sample of silence at most."""
    if from_rate != to_rate:
        import soxr

        samples = soxr.resample(samples, from_rate, to_rate, quality="HQ")
    missing = num_samples - len(samples)
    return np.pad(samples, (0, missing)) if missing > 0 else samples[:num_samples]
