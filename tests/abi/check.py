"""Checks the installed library's binary interface against what is frozen.

    python tests/abi/check.py LIBDIR HEADER SYMBOLS

Exported symbols are exactly those of SYMBOLS and of the header, nothing unexpected is linked, and
the SONAME is the one of Cargo.toml's version.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What every Linux with glibc has: the C library's parts and gcc's unwinder.
ALLOWED_LIBRARIES = r"(libc|libm|libgcc_s|libpthread|libdl|ld-linux-[\w-]+)\.so\.\d+"

failures = []


def check(ok: bool, message: str) -> None:
    if not ok:
        failures.append(message)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def difference(what: str, got: set[str], expected: set[str]) -> None:
    check(not got - expected, f"{what}: unexpected {sorted(got - expected)}")
    check(not expected - got, f"{what}: missing {sorted(expected - got)}")


def defined(library: Path) -> set[str]:
    """The functions and variables that `library` defines for others."""
    table = "--dyn-syms" if library.suffix == ".so" else "--symbols"
    # Num: Value Size Type Bind Visibility Section Name
    rows = (line.split() for line in run("readelf", "--wide", table, str(library)).splitlines())
    return {
        row[7].split("@")[0]
        for row in rows
        if len(row) == 8
        and row[4] in ("GLOBAL", "WEAK", "UNIQUE")
        and row[5] in ("DEFAULT", "PROTECTED")
        and row[6] != "UND"
    }


def main(libdir: Path, header: Path, symbols: Path) -> int:
    frozen = symbols.read_text().split()
    check(frozen == sorted(set(frozen)), f"{symbols} is not sorted")
    declared = set(
        re.findall(r"\b(mlstm_\w+)\(", re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.S))
    )
    difference("functions of the header", declared, set(frozen))

    shared = libdir / "libmlstm.so"
    difference("exports of libmlstm.so", defined(shared), set(frozen))
    static = {name for name in defined(libdir / "libmlstm.a") if name.startswith("mlstm_")}
    difference("exports of libmlstm.a", static, set(frozen))

    dynamic = run("readelf", "--dynamic", "--wide", str(shared))
    major, minor, patch = re.search(
        r'^version = "(\d+)\.(\d+)\.(\d+)', (ROOT / "Cargo.toml").read_text(), re.M
    ).groups()
    soname = f"libmlstm.so.{major}"
    check(f"Library soname: [{soname}]" in dynamic, f"the SONAME is not {soname}")
    needed = re.findall(r"Shared library: \[(.+)\]", dynamic)
    for name in needed:
        check(bool(re.fullmatch(ALLOWED_LIBRARIES, name)), f"needs {name}")
    check("(TEXTREL)" not in dynamic, "has text relocations")
    check("RPATH" not in dynamic and "RUNPATH" not in dynamic, "has a search path")
    stack = re.search(r"GNU_STACK.*", run("readelf", "--segments", "--wide", str(shared)))
    check(bool(stack) and "RWE" not in stack[0], "asks for an executable stack")

    for link, target in [
        (shared, soname),
        (libdir / soname, f"libmlstm.so.{major}.{minor}.{patch}"),
    ]:
        check(
            link.is_symlink() and str(link.readlink()) == target,
            f"{link} is not a link to {target}",
        )

    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", run("readelf", "--version-info", str(shared)))
    newest = max((int(a), int(b)) for a, b in versions)
    print(
        f"{len(frozen)} exports, {soname}, needs {' '.join(needed)}, glibc {newest[0]}.{newest[1]}"
    )
    for failure in failures:
        print(f"FAILED: {failure}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
