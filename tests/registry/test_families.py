"""Which class serves a checkpoint: built in, by entry point, or by plugin."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from registry import families
from registry.errors import CheckpointError, RegistryError, UnknownArchitectureError
from registry.families import bind_family, known_families

LLAVA = "LlavaForConditionalGeneration"
PLUGIN = """
from registry import MULTIMODAL_REGISTRY, ItemLayout, Run, SupportsMultiModal

class Base(SupportsMultiModal):
    architectures = ("NobodyHasThis",)

@MULTIMODAL_REGISTRY.register_image_layout(lambda ctx, media: ItemLayout((Run(3, {count}),), {{}}))
class {name}(Base):
    architectures = {architectures!r}
"""


@pytest.fixture
def write_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request) -> Callable[..., str]:
    """Writes a module with one family and returns the module's name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, *architectures: str, count: int = 1) -> str:
        module = f"plugin_{abs(hash(request.node.name))}_{name.lower()}"
        monkeypatch.setitem(sys.modules, module, None)
        del sys.modules[module]
        text = PLUGIN.format(name=name, architectures=architectures, count=count)
        (tmp_path / f"{module}.py").write_text(text, "utf-8")
        return module

    return write


@pytest.fixture
def set_entry_points(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that packages with these entry points are installed: architecture -> "module:Class"."""

    def set_them(**values: str) -> None:
        entries = [EntryPoint(name, value, families.ENTRY_POINT_GROUP) for name, value in values.items()]
        monkeypatch.setattr(families, "entry_points", lambda group: entries if group == "diptych.models" else [])

    return set_them


def with_architecture(ctx, *architectures: str):
    return replace(ctx, model_config=SimpleNamespace(architectures=list(architectures), image_token_index=3))


def test_built_in(ctx) -> None:
    family = bind_family(ctx)
    assert family.name == LLAVA
    assert family.modalities == ("image",)
    assert family.cls.executor_model == "executor_service.models.llava:LlavaModel"


def test_built_in_families_are_named_not_imported() -> None:
    assert known_families()[LLAVA] == f"registry.models.llava:{LLAVA}"


def test_unknown_architecture_lists_what_is_registered(ctx, write_plugin) -> None:
    module = write_plugin("Mine", "MineForImages")
    other = with_architecture(ctx, "OtherForImages", LLAVA)
    expected = ", ".join(sorted([*known_families(), "MineForImages", "NobodyHasThis"]))
    with pytest.raises(UnknownArchitectureError) as caught:
        bind_family(other, [module])
    assert str(caught.value) == (
        f"no family is registered for architecture 'OtherForImages' of {ctx.model_dir}; registered: {expected}; "
        "--plugin MODULE brings others"
    )


def test_no_architecture(ctx) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json names no architecture$"):
        bind_family(with_architecture(ctx))


def test_a_plugin_by_its_own_name_or_several(ctx, write_plugin) -> None:
    module = write_plugin("Mine", "FirstOfMine", "SecondOfMine")
    for name in ("FirstOfMine", "SecondOfMine"):
        assert bind_family(with_architecture(ctx, name), [module]).name == "Mine"
    assert bind_family(with_architecture(ctx, "Unnamed"), [write_plugin("Unnamed")]).name == "Unnamed"


def test_a_plugin_beats_the_built_in_with_one_warning(ctx, write_plugin) -> None:
    module = write_plugin("Better", LLAVA)
    message = f"^{LLAVA} is registered more than once; the plugin {module} counts$"
    with pytest.warns(UserWarning, match=message) as warned:
        assert bind_family(ctx, [module]).name == "Better"
    assert len(warned) == 1


def test_two_classes_of_one_plugin(ctx, tmp_path, monkeypatch) -> None:
    """The later one counts, and a second name of a class is no second class."""
    monkeypatch.syspath_prepend(tmp_path)
    second = """
@MULTIMODAL_REGISTRY.register_image_layout(lambda ctx, media: ItemLayout((Run(3, 2),), {}))
class Second(First):
    pass

Alias = Second
"""
    text = PLUGIN.format(name="First", architectures=("Mine",), count=1) + second
    (tmp_path / "plugin_of_two.py").write_text(text, "utf-8")
    message = "^Mine is registered more than once; Second of the plugin plugin_of_two counts$"
    with pytest.warns(UserWarning, match=message) as warned:
        assert bind_family(with_architecture(ctx, "Mine"), ["plugin_of_two"]).name == "Second"
    assert len(warned) == 1


def test_an_entry_point_beats_the_built_in(ctx, write_plugin, set_entry_points) -> None:
    set_entry_points(**{LLAVA: f"{write_plugin('Installed', LLAVA)}:Installed"})
    with pytest.warns(UserWarning, match=f"^{LLAVA} is registered more than once; the entry point counts$") as warned:
        assert bind_family(ctx).name == "Installed"
    assert len(warned) == 1


def test_a_plugin_beats_an_entry_point(ctx, write_plugin, set_entry_points) -> None:
    set_entry_points(Mine=f"{write_plugin('Installed', 'Mine')}:Installed")
    mine = with_architecture(ctx, "Mine")
    assert bind_family(mine).name == "Installed"
    with pytest.warns(UserWarning, match="^Mine is registered more than once; the plugin ") as warned:
        assert bind_family(mine, [write_plugin("Plugged", "Mine")]).name == "Plugged"
    assert len(warned) == 1


def test_plugins_that_are_none() -> None:
    with pytest.raises(RegistryError, match=r"^cannot import the plugin 'no_such_module_at_all': No module named"):
        known_families(["no_such_module_at_all"])
    with pytest.raises(RegistryError, match=r"^the plugin 'json' defines no class that implements SupportsMultiModal$"):
        known_families(["json"])


BROKEN = {
    "def f(:": "SyntaxError: invalid syntax",
    "1 / 0": "ZeroDivisionError: division by zero",
    "raise SystemExit(3)": "SystemExit: 3",
}


@pytest.mark.parametrize("text", BROKEN)
def test_modules_that_do_not_run(ctx, tmp_path, monkeypatch, set_entry_points, text: str) -> None:
    name = f"does_not_run_{list(BROKEN).index(text)}"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{name}.py").write_text(text, "utf-8")
    with pytest.raises(RegistryError, match=f"^cannot import the plugin '{name}': {BROKEN[text]}"):
        known_families([name])
    set_entry_points(Mine=f"{name}:Mine")
    with pytest.raises(RegistryError, match=f"^cannot load the family '{name}:Mine': {BROKEN[text]}"):
        bind_family(with_architecture(ctx, "Mine"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module_at_all:Mine", "^cannot load the family 'no_such_module_at_all:Mine': No module named"),
        ("json:Mine", "^cannot load the family 'json:Mine': module 'json' has no attribute 'Mine'"),
        ("json:JSONDecoder", "^'json:JSONDecoder' does not implement SupportsMultiModal$"),
        ("json:dumps", "^'json:dumps' does not implement SupportsMultiModal$"),
    ],
)
def test_entry_points_that_are_none(ctx, set_entry_points, value: str, message: str) -> None:
    set_entry_points(Mine=value)
    with pytest.raises(RegistryError, match=message):
        bind_family(with_architecture(ctx, "Mine"))
