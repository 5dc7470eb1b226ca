"""This processor, as LLVM sees it: what it can do, and compiling for it."""

import functools
from typing import Any

import llvmlite.binding as llvm
import numpy as np


@functools.cache
def has_fma() -> bool:
    """Whether a product and a sum can be rounded together."""
    on_x86 = llvm.get_process_triple().startswith(("x86", "i386", "i686"))
    return not on_x86 or bool(llvm.get_host_cpu_features().get("fma"))


@functools.cache  # asking LLVM takes longer than some solves
def vector_lanes(dtype: np.dtype) -> int:
    """How many numbers fit the widest vector of this processor."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        size = 64
    elif features.get("avx"):
        size = 32
    else:
        size = 16
    return size // dtype.itemsize


def compiled(text: str, *, opt: int = 3) -> Any:
    """An engine that holds the functions of LLVM's `text`, optimised for this processor."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(text)
    module.verify()
    # vectors are written at the width they shall have
    features = f"{llvm.get_host_cpu_features().flatten()},-prefer-256-bit"
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=opt, jit=True
    )
    options = llvm.create_pipeline_tuning_options(speed_level=opt)
    options.loop_vectorization = options.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine
