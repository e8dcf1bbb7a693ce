"""Build hook: generates the Python code of the protos, which is never committed."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = ROOT / "diptych" / "v1"


def generate_protos() -> None:
    """Compile protos/diptych/v1 to diptych/v1; google/rpc comes from googleapis-common-protos."""
    import grpc_tools
    from grpc_tools import protoc

    sources = sorted(str(path) for path in (ROOT / "protos" / "diptych" / "v1").glob("*.proto"))
    PACKAGE.mkdir(parents=True, exist_ok=True)
    arguments = [
        "protoc",
        f"-I{ROOT / 'protos'}",
        f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
        f"--python_out={ROOT}",
        f"--pyi_out={ROOT}",
        f"--grpc_python_out={ROOT}",
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc failed on {', '.join(sources)}")
    (PACKAGE / "__init__.py").write_text('"""Generated from protos/diptych/v1; do not edit."""\n')


class BuildWithProtos(build_py):
    """build_py after the protos have been generated, so that the packages contain them."""

    def finalize_options(self) -> None:
        """Generate before setuptools looks for packages."""
        generate_protos()
        if self.distribution.packages is not None and "diptych.v1" not in self.distribution.packages:
            self.distribution.packages.append("diptych.v1")
        super().finalize_options()


setup(cmdclass={"build_py": BuildWithProtos})
