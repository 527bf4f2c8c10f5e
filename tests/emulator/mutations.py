"""Mistakes in the Hopper forward that the emulator must find: a test of the tests."""

from dataclasses import dataclass


@dataclass
class Mutation:
    name: str
    file: str
    old: str
    new: str
    expected: str  # what the report says
    kernel: str = "hopper_forward_bf16_64x64"

    @property
    def definition(self) -> str:
        form = self.kernel.removeprefix("hopper_").removesuffix("_bf16_64x64").upper()
        return f"MLSTM_{form}({self.kernel}, mlstm::bf16, 1, 1)"


MUTATIONS = [
    Mutation(
        "P without a proxy fence",
        "forward_sm90.cuh",
        "      async_proxy_fence();\n      barrier_arrive(block.bar(kScoreFull, i & 1));\n",
        "      barrier_arrive(block.bar(kScoreFull, i & 1));\n",
        "without fence.proxy.async",
    ),
    Mutation(
        "P not waited for",
        "forward_sm90.cuh",
        "        barrier_wait(block.bar(kScoreFull, i & 1), i >> 1 & 1);\n",
        "",
        "race: read",
    ),
    Mutation(
        "q given back before its product is done",
        "forward_sm90.cuh",
        "      wgmma_wait<kEarly ? 1 : 0>();\n",
        "",
        "race: write",
    ),
    Mutation(
        "tile of h written before it is stored",
        "forward_sm90.cuh",
        "      if (leader) store_wait_read();\n      block.sync_group(group);\n      barrier_wait",
        "      block.sync_group(group);\n      barrier_wait",
        "by the copy engine's stores",
    ),
    Mutation(
        "an arrival too many expected",
        "forward_block_sm90.cuh",
        "barrier_init(bar(kQueryEmpty, stage), 1 + Shape::kWgs);",
        "barrier_init(bar(kQueryEmpty, stage), 2 + Shape::kWgs);",
        "deadlock",
    ),
    Mutation(
        "an arrival too few expected",
        "forward_block_sm90.cuh",
        "barrier_init(bar(kKeyEmpty, stage), Shape::kKeyReleases);",
        "barrier_init(bar(kKeyEmpty, stage), Shape::kKeyReleases - 1);",
        "race: write",
    ),
    Mutation(
        "shared memory too small",
        "forward_shape_sm90.cuh",
        "kBytes = kBarrierAt + 448 + 1024;",
        "kBytes = kBarrierAt + 256;",
        "out of the block's",
    ),
    Mutation(
        "denominators in the order of tokens",
        "forward_sm90.cuh",
        "store_shared(block.den(i & 1) + column_order(r) * 4,",
        "store_shared(block.den(i & 1) + r * 4,",
        "h: error",
    ),
    Mutation(
        "a forgotten state multiplied by zero",
        "forward_sm90.cuh",
        "weight == 0.0f ? 0.0f : o[8 * j + x] * weight;",
        "o[8 * j + x] * weight;",
        "h: error inf",
    ),
    Mutation(
        "a chunk before the segment not waited for",
        "forward_sm90.cuh",
        "      barrier_wait(block.bar(kAheadFull, Shape::ahead_stage(i)), block.ahead_phase(i));\n"
        "      weigh(Shape::ahead_stage(i), 0);\n",
        "      weigh(Shape::ahead_stage(i), 0);\n",
        "race: read",
        "hopper_catch_up_bf16_64x64",
    ),
    Mutation(
        "warps apart where nothing is left of the state",
        "forward_sm90.cuh",
        "      block.sync_group(group);\n      finish(i);\n",
        "      finish(i);\n",
        "deadlock",
        "hopper_catch_up_bf16_64x64",
    ),
]
