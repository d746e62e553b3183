"""The configs go into the wheel as part of the package; in a checkout they stay beside it."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies configs/ to medlora/configs."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for file in self._list_configs():
            target = Path(self.build_lib) / "medlora" / "configs" / file.name
            self.mkpath(str(target.parent))
            self.copy_file(str(file), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        copied = [str(Path(self.build_lib) / "medlora" / "configs" / file.name) for file in self._list_configs()]
        return [*super().get_outputs(include_bytecode), *([] if self.editable_mode else copied)]

    def _list_configs(self) -> list[Path]:
        folder = Path(__file__).parent / "configs"
        return sorted(file for file in folder.iterdir() if file.suffix in (".yaml", ".json"))


setup(cmdclass={"build_py": BuildWithConfigs})
