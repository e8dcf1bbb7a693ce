"""Flags, settings and errors that need no server."""

from __future__ import annotations

import json
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import pytest

from diptych.cli.both import BothSettings
from diptych.cli.commands import COMMANDS, UsageError
from diptych.cli.main import main
from diptych.client import Client, RequestError
from diptych.client.results import Piece
from tests.cli.command import diptych
from tests.plugins.checkpoints import make_qwen2_audio, make_video_llava
from tests.tiny_checkpoint import encoded, make_checkpoint, picture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The command in this process: exit code, standard output, standard error."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_help_teaches_with_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert "examples:" in out


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("health",),
        ("health", "--address", "x:1", "--nonsense"),
        ("generate", "--prompt", "x"),
        ("generate", "--address", "x:1"),
        ("generate", "--address", "x:1", "--model", "y", "--prompt", "x"),
        ("generate", "--address", "x:1", "--prompt", "x", "--max-tokens", "many"),
        ("generate", "--address", "x:1", "--prompt", "x", "--logit-bias", "5"),
        ("generate", "--address", "x:1", "--prompt", "x", "--logit-bias", "five=5"),
        ("plan", "--address", "x:1", "--prompt", "x", "--limit-mm-per-prompt", "image=2"),
        ("plan", "--model", "x", "--prompt", "x", "--limit-mm-per-prompt", "image"),
        ("preprocess", "--model", "x"),
        ("preprocess", "--model", "x", "--executor", "nowhere"),
        ("preprocess", "--model", "x", "--executor", "a:1", "--port", "70000"),
        ("preprocess", "--model", "x", "--executor", "a:1", "--max-pending", "3"),
        ("serve",),
        ("serve", "--model", "x", "--max-num-seqs", "0"),
        ("serve", "--model", "x", "--config", "/does/not/exist.yaml"),
        ("executor", "--model", "x", "--dtype", "int3"),
    ],
)
def test_wrong_options_are_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "usage:" in err


@pytest.mark.parametrize("command", [("generate", "--address", "127.0.0.1:1"), ("plan", "--model", "/nowhere")])
def test_a_picture_that_is_not_there(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    code, out, err = call(capsys, *command, "--prompt", "<image>", "--image", "/no/such.png")
    assert (code, out) == (1, "")
    assert err.startswith("NOT_FOUND: cannot read /no/such.png")


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "models", "--address", "127.0.0.1:1")
    assert code == 1
    assert err.startswith("UNAVAILABLE: ")


def test_a_checkpoint_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "plan", "--model", "/nowhere", "--prompt", "x")
    assert code == 1
    assert err.startswith("INVALID_ARGUMENT: /nowhere is not a checkpoint directory")


def test_plan_without_a_server(capsys: pytest.CaptureFixture[str], model: Path, image: Path) -> None:
    code, out, _ = call(capsys, "plan", "--model", model, "--prompt", "<image>hi", "--image", image, "--json")
    assert code == 0
    plan = json.loads(out)
    assert plan["prompt_token_ids"][:5] == [1, 3, 3, 3, 3]
    (item,) = plan["items"]
    assert set(item) == {"modality", "digest", "offset", "length", "tensors"}
    assert (item["modality"], item["offset"], item["length"]) == ("image", 1, 4)
    assert item["tensors"] == [{"name": "pixel_values", "dtype": "uint8", "shape": [3, 28, 28]}]
    assert len(bytes.fromhex(item["digest"])) == 32


def test_plan_of_a_chat(capsys: pytest.CaptureFixture[str], model: Path, image: Path) -> None:
    arguments = ("plan", "--model", model, "--chat", "--limit-mm-per-prompt", "image=2", "--json")
    code, out, _ = call(capsys, *arguments, "--prompt", "<image> or <image>?", "--image", image, "--image", image)
    assert code == 0
    assert [item["length"] for item in json.loads(out)["items"]] == [4, 4]
    code, _, err = call(capsys, *arguments, "--prompt", "<image> or <image>?", "--image", image)
    assert code == 1
    assert "2 media placeholders and the request has 1" in err


def test_plan_for_people(capsys: pytest.CaptureFixture[str], model: Path, image: Path) -> None:
    code, out, _ = call(capsys, "plan", "--model", model, "--prompt", "<image>", "--image", image)
    assert code == 0
    assert "5 prompt tokens, 1 media items" in out
    assert "pixel_values: uint8 [3, 28, 28]" in out


def test_too_many_pictures(capsys: pytest.CaptureFixture[str], model: Path, image: Path) -> None:
    code, _, err = call(
        capsys, "plan", "--model", model, "--prompt", "<image><image>", "--image", image, "--image", image
    )
    assert code == 1
    assert err.splitlines()[0].startswith("INVALID_ARGUMENT: the prompt has 2 image items; at most 1")
    assert "  limit: 1" in err.splitlines()
    assert "  actual: 2" in err.splitlines()


def test_a_command_that_asks_starts_without_the_heavy_libraries() -> None:
    code = (
        "import sys; from diptych.cli.main import main\n"
        "for command in ('health', 'models', 'generate', 'plan'):\n"
        "    try: main([command, '--address', '127.0.0.1:1', '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- settings -------------------------------------------------------------------------------------


def test_flag_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("max-num-seqs: 3\nmax_model_len: 100\nmax_pending_requests: 5\nlimit_mm_per_prompt: {image: 2}\n")
    monkeypatch.setenv("DIPTYCH_MAX_MODEL_LEN", "200")
    monkeypatch.setenv("DIPTYCH_MAX_PENDING_REQUESTS", "6")
    both = BothSettings({"model": "m", "config": str(config), "max_pending_requests": "7"})
    assert (both.executor.max_num_seqs, both.executor.max_model_len) == (3, 200)
    assert both.preprocess.max_pending_requests == 7
    assert both.preprocess.limit_mm_per_prompt == both.executor.limit_mm_per_prompt == {"image": 2}
    executor, preprocess = both.executor_arguments(0), both.preprocess_arguments("127.0.0.1:9")
    assert "--max-num-seqs=3" in executor
    assert not any("max-model-len" in flag for flag in executor), "the child reads its environment itself"
    assert "--limit-mm-per-prompt=image=2" in executor
    assert "--limit-mm-per-prompt=image=2" in preprocess
    assert "--max-pending-requests=7" in preprocess
    assert not any("max-num-seqs" in flag for flag in preprocess)
    assert "--executor=127.0.0.1:9" in preprocess


def test_only_the_public_service_gets_the_public_address() -> None:
    both = BothSettings({"model": "m", "host": "0.0.0.0", "port": "1234"})
    assert {"--host=127.0.0.1", "--port=0"} <= set(both.executor_arguments(0))
    assert {"--host=0.0.0.0", "--port=1234"} <= set(both.preprocess_arguments("127.0.0.1:9"))


@pytest.mark.parametrize(("port", "executors"), [("9464", "--metrics-port=9465"), ("0", "--metrics-port=0")])
def test_the_two_services_do_not_share_a_metrics_port(
    monkeypatch: pytest.MonkeyPatch, port: str, executors: str
) -> None:
    for arguments in ({"model": "m", "metrics_port": port}, {"model": "m"}):
        both = BothSettings(arguments)
        assert executors in both.executor_arguments(1)
        monkeypatch.setenv("DIPTYCH_METRICS_PORT", port)  # the flag is not needed the second time
    monkeypatch.delenv("DIPTYCH_METRICS_PORT")
    assert not any("metrics-port" in flag for flag in BothSettings({"model": "m"}).executor_arguments(1))


@pytest.mark.parametrize("endpoint", ["collector:4317", "http://collector:4317/v1/traces", "ftp://collector"])
def test_an_endpoint_is_a_url_of_a_host(endpoint: str) -> None:
    with pytest.raises(UsageError, match="--otlp-endpoint"):
        BothSettings({"model": "m", "otlp_endpoint": endpoint})


def test_opentelemetrys_own_variable_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://one:4317")
    assert BothSettings({"model": "m"}).preprocess.otlp_endpoint == "http://one:4317"
    assert BothSettings({"model": "m", "otlp_endpoint": "http://two:1"}).executor.otlp_endpoint == "http://two:1"


def test_a_key_that_no_service_has(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("max_nonsense: 3\n")
    with pytest.raises(UsageError, match="unknown settings: max_nonsense"):
        BothSettings({"model": "m", "config": str(config)})


def test_a_boot_that_fails_says_why(tmp_path: Path) -> None:
    done = diptych("preprocess", "--model", tmp_path, "--executor", "127.0.0.1:1", "--port", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert "INVALID_ARGUMENT: " in done.stderr
    assert "is not a checkpoint directory" in done.stderr


PLUGIN = ("--plugin", "tests.plugins.qwen2_audio,tests.plugins.video_llava")


@pytest.fixture(scope="module")
def audio_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_audio(tmp_path_factory.mktemp("audio"))


def test_a_plan_with_audio(capsys: pytest.CaptureFixture[str], audio_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    asked = ("plan", "--model", audio_model, *PLUGIN, "--prompt", "a <|AUDIO|>", "--audio", path)
    code, out, err = call(capsys, *asked)
    assert (code, err) == (0, "")
    assert "item 0: audio, tokens 3 to 16 (14, 12 of them features)" in out
    assert "input_features: float32 [16, 100]" in out
    code, out, _ = call(capsys, *asked, "--json")
    assert json.loads(out)["items"][0]["modality"] == "audio"


def test_media_keep_the_order_of_their_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path, image: Path) -> None:
    model, clip = make_video_llava(tmp_path / "model"), tmp_path / "a.gif"
    frames = [picture(seed=seed) for seed in range(4)]
    clip.write_bytes(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50))
    asked = ("plan", "--model", model, *PLUGIN, "--limit-mm-per-prompt", "image=2", "--json", "--prompt")
    code, out, _ = call(capsys, *asked, "<image><video><image>", "--image", image, "--video", clip, "--image", image)
    assert code == 0
    assert [item["modality"] for item in json.loads(out)["items"]] == ["image", "video", "image"]
    for flags in ((), ("--chat",)):
        wrong = ("--video", clip, "--image", image)
        code, _, err = call(capsys, *asked, "<image> or <video>", *wrong, *flags)
        assert code == 1
        assert err.startswith("INVALID_ARGUMENT: placeholder 0 of the prompt is for image, item 0 is video")


def test_a_plugin_beside_the_user_is_found(model: Path, image: Path, tmp_path: Path) -> None:
    """The installed command, given in the plugin's folder."""
    (tmp_path / "my_family.py").write_text("raise ImportError('it was found')")
    command = [Path(sys.executable).with_name("diptych"), "plan", "--model", model, "--plugin", "my_family"]
    done = subprocess.run([*command, "--prompt", "x"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot import the plugin 'my_family': it was found" in done.stderr


def test_a_boot_error_is_the_last_word(tmp_path: Path) -> None:
    """Not what nobody waited for any more behind it."""
    done = diptych("executor", "--model", tmp_path, "--port", 0)
    assert done.returncode == 1
    assert "config.json" in done.stderr
    assert "never retrieved" not in done.stderr


def test_an_error_after_some_text_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def stream(*_: object, **__: object) -> Iterator[Piece]:
        yield Piece("half an", (5,), (), None)
        raise RequestError("UNAVAILABLE", "the executor went away", {})

    monkeypatch.setattr(Client, "stream", stream)
    code, output, error = call(capsys, "generate", "--address", "127.0.0.1:1", "--prompt", "x")
    assert (code, output) == (1, "half an\n")
    assert error.startswith("UNAVAILABLE: the executor went away")
