"""CUDA sources for the emulator: inline PTX becomes calls of its functions, all else stays.

An instruction that INSTRUCTIONS lacks ends the run when a thread comes to it.
"""

import re
from pathlib import Path

# PTX, where %name is an operand and white space is free, and the C++ for it.
INSTRUCTIONS = {
    "elect.sync _|p, 0xffffffff; selp.u32 %d, 1, 0, p;": "{d} = emu::current % 32 == 0;",
    # mbarriers and named barriers
    "mbarrier.init.shared.b64 [%b], %n;": "emu::barrier_init({b}, {n});",
    "mbarrier.arrive.shared.b64 _, [%b];": "emu::barrier_arrive({b});",
    "mbarrier.arrive.expect_tx.shared.b64 _, [%b], %n;": "emu::barrier_expect({b}, {n});",
    "again_%=: mbarrier.try_wait.parity.shared.b64 p, [%b], %p; @!p bra again_%=;": (
        "emu::barrier_wait({b}, {p});"
    ),
    "bar.sync %i, %n;": "emu::named_sync({i}, {n});",
    # The copy engine
    "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
    " [%to], [%m, {%v, %w, %x, %y, %z}], [%b];": (
        "emu::load_box({to}, {m}, {b}, {{{v}, {w}, {x}, {y}, {z}}});"
    ),
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    " [%to], [%m, {%x, %y}], [%b];": "emu::load_box({to}, {m}, {b}, {{{x}, {y}}});",
    "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%m, {%v, %w, %x, %y, %z}], [%from];": (
        "emu::store_box({m}, {from}, {{{v}, {w}, {x}, {y}, {z}}});"
    ),
    "cp.async.bulk.commit_group;": "emu::store_commit();",
    "cp.async.bulk.wait_group.read 0;": "emu::store_wait();",
    "prefetch.tensormap [%m];": "emu::check_map({m});",
    # Fences, and what says something to the compiler or the hardware alone
    "fence.proxy.async.shared::cta;": "emu::proxy_fence();",
    "fence.mbarrier_init.release.cluster;": "",
    "wgmma.fence.sync.aligned;": "",
    "setmaxnreg.inc.sync.aligned.u32 %n;": "",
    "setmaxnreg.dec.sync.aligned.u32 %n;": "",
    "": "",
    # Products; "wgmma.mma_async" itself is below
    "wgmma.commit_group.sync.aligned;": "emu::wgmma_commit();",
    "wgmma.wait_group.sync.aligned %n;": "emu::wgmma_wait({n});",
    # Matrices
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%a, %b, %c, %d}, [%p];": (
        "emu::load_matrices_transposed({p}, {a}, {b}, {c}, {d});"
    ),
    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%p], {%a, %b, %c, %d};": (
        "emu::store_matrices(false, {p}, {a}, {b}, {c}, {d});"
    ),
    "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%p], {%a, %b, %c, %d};": (
        "emu::store_matrices(true, {p}, {a}, {b}, {c}, {d});"
    ),
    # Clusters, of one block
    "mapa.shared::cluster.u32 %d, %a, %b;": "{d} = {a};",
    "st.shared::cluster.v2.f32 [%p], {%a, %b};": "emu::store_registers<4>({p}, {a}, {b});",
    # Numbers
    "ex2.approx.ftz.f32 %d, %a;": "{d} = emu::exp2_flushed({a});",
    "rcp.approx.ftz.f32 %d, %a;": "{d} = emu::reciprocal_flushed({a});",
    "mul.f32 %d, %a, %b;": "{d} = {a} * {b};",
    "fma.rn.f32 %d, %a, %b, %d;": "{d} = std::fma({a}, {b}, {d});",
    "cvt.rn.satfinite.f16x2.f32 %d, %h, %l;": "{d} = emu::pack_f16_finite({h}, {l});",
}
for ptx, size in {"f32": 4, "b32": 4, "b16": 2}.items():
    load, store = f"emu::load_registers<{size}>", f"emu::store_registers<{size}>"
    INSTRUCTIONS |= {
        f"ld.shared.{ptx} %a, [%p];": load + "({p}, {a});",
        f"ld.shared.v4.{ptx} {{%a, %b, %c, %d}}, [%p];": load + "({p}, {a}, {b}, {c}, {d});",
        f"st.shared.{ptx} [%p], %a;": store + "({p}, {a});",
        f"st.shared.v2.{ptx} [%p], {{%a, %b}};": store + "({p}, {a}, {b});",
        f"st.shared.v4.{ptx} [%p], {{%a, %b, %c, %d}};": store + "({p}, {a}, {b}, {c}, {d});",
    }


def normal(ptx: str) -> str:
    """Without the white space that means nothing."""
    return re.sub(r"\s*([,;])\s*", r"\1", re.sub(r"\s+", " ", ptx)).strip()


def rule(ptx: str) -> re.Pattern:
    """The operands of an instruction are groups; one that comes again is the same operand."""
    seen = set()

    def group(match: re.Match) -> str:
        name = match.group(1)
        if name in seen:
            return rf"%(?P={name})"
        seen.add(name)
        return rf"%(?P<{name}>\d+)"

    return re.compile(re.sub(r"%([a-z]+)", group, re.escape(normal(ptx))))


RULES = [(rule(ptx), cpp) for ptx, cpp in INSTRUCTIONS.items()]
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|.', re.DOTALL)


def split(text: str, separator: str) -> list[str]:
    """At the separators outside of brackets and strings."""
    parts, depth = [""], 0
    for token in TOKEN.findall(text):
        depth += (token in "([{") - (token in ")]}")
        if token == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def closing(text: str, at: int) -> int:
    """The index after the bracket that closes the one at `at`."""
    depth = 0
    for match in TOKEN.finditer(text, at):
        depth += (match.group() in "([{") - (match.group() in ")]}")
        if depth == 0:
            return match.end()
    raise ValueError("an open bracket")


def product(a_in_registers: bool) -> str:
    """wgmma, which stands in macros: T, N, kTransA and kTransB, d, a, b and add are their names."""
    a_transposed = "false" if a_in_registers else "kTransA != 0"
    a, registers = ("0", "a") if a_in_registers else ("a", "nullptr")
    return (
        f"emu::wgmma({{N, std::is_same_v<T, __half>, {str(a_in_registers).lower()}, {a_transposed},"
        f" kTransB != 0, {a}, b, add}}, d, {registers});"
    )


def statement(body: str) -> str:
    """What stands between the brackets of an asm statement, as C++."""
    template, *rest = split(body.replace("\\\n", " "), ":")
    template = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', template))
    if "wgmma.mma_async" in template:
        return product('"r"(a[0])' in body)
    operands = [
        "(" + re.fullmatch(r'\s*"[^"]*"\s*\((.*)\)\s*', operand, re.DOTALL).group(1) + ")"
        for section in rest[:2]
        for operand in split(section, ",")
        if operand.strip()
    ]
    plain = re.sub(r"^\{(.*)\}$", r"\1", template.replace("\\n", " ").strip())
    plain = normal(re.sub(r"\.reg \.pred \w+;", "", plain))
    for pattern, cpp in RULES:
        match = pattern.fullmatch(plain)
        if match:
            return cpp.format(**{name: operands[int(x)] for name, x in match.groupdict().items()})
    return f'emu::unsupported("{plain}");'


def source(text: str) -> str:
    """A whole file. Lines keep their numbers."""
    out, at = "", 0
    for match in re.finditer(r"\basm\b(?:\s+volatile)?\s*\(", text):
        end = text.index(";", closing(text, match.end() - 1)) + 1
        old = text[match.start() : end]
        new = "{ " + statement(old[match.end() - match.start() : old.rindex(")")]) + " }"
        line_end = "\\\n" if "\\\n" in old else "\n"
        out += text[at : match.start()] + new + line_end * old.count("\n")
        at = end
    out += text[at:]
    # CUDA's own headers are cuda.h's to stand in for.
    out = re.sub(r"^#include <cuda_\w+\.h>$", "", out, flags=re.MULTILINE)
    return re.sub(
        r"extern __shared__ unsigned char (\w+)\[\];",
        r"unsigned char* const \1 = emu::dynamic_shared();",
        out,
    )


def translate(sources: Path, target: Path, change: tuple[str, str, str] | None = None) -> None:
    """Translates all CUDA sources of a folder; `change` is a file, a text in it and another one."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(sources.glob("*.cu*")):
        text = path.read_text()
        if change and path.name == change[0]:
            _, old, new = change
            if text.count(old) != 1:
                raise SystemExit(f"kernels/{path.name} does not have once:\n{old}")
            text = text.replace(old, new)
        (target / path.name).write_text(f'#line 1 "kernels/{path.name}"\n' + source(text))
