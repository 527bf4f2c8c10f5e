"""Runs the examples of a Markdown file: fenced blocks that follow `<!-- test: c -->` or
`<!-- test: python -->`.

    python tests/readme.py README.md

C is compiled against what pkg-config finds, Python runs in this interpreter's environment, each
block in a process and an empty folder of its own.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"^<!-- test: (\w+) -->\n+```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pkg_config(*options: str) -> list[str]:
    command = ["pkg-config", *options, "mlstm"]
    return shlex.split(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_c(source: Path) -> None:
    program = source.with_suffix("")
    [libdir] = pkg_config("--variable=libdir")
    subprocess.run(
        [
            *shlex.split(os.environ.get("CC", "cc")),
            *"-std=c11 -Wall -Werror -g -fsanitize=address,undefined".split(),
            *pkg_config("--cflags"),
            str(source),
            *pkg_config("--libs"),
            f"-Wl,-rpath,{libdir}",
            *["-lm", "-o", str(program)],
        ],
        check=True,
    )
    subprocess.run([str(program)], check=True, cwd=source.parent)


def run_python(source: Path) -> None:
    subprocess.run([sys.executable, str(source)], check=True, cwd=source.parent)


RUNNERS = {"c": (".c", run_c), "python": (".py", run_python)}


def main(document: Path) -> int:
    text = document.read_text()
    blocks = list(BLOCK.finditer(text))
    marks = text.count("<!-- test:")
    if len(blocks) != marks or not blocks:
        print(f"{document}: {marks} test marks, {len(blocks)} of them before a block")
        return 1
    failed = 0
    for block in blocks:
        language, fence, code = block.groups()
        line = text.count("\n", 0, block.start(3)) + 1
        place = f"{document}:{line} ({language})"
        if language != fence or language not in RUNNERS:
            print(f"{place}: cannot run a {fence} block as {language}")
            failed += 1
            continue
        suffix, runner = RUNNERS[language]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / f"block{suffix}"
            source.write_text(code)
            print(place, flush=True)
            try:
                runner(source)
            except subprocess.CalledProcessError as error:
                print(f"{place}: FAILED, {error}")
                failed += 1
    return failed != 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
