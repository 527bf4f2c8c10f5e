// SPDX-License-Identifier: MIT OR Apache-2.0
//
// The functions of mlstm.h as XLA FFI custom calls; README.md beside this file documents the
// targets. This file binds buffers, converts and calls; what is computed and what is refused is
// decided behind mlstm.h. It needs neither Python nor CUDA headers.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include <mlstm.h>
#include <xla/ffi/api/ffi.h>

namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using ffi::DataType;
using ffi::Error;
using ffi::ErrorCode;

Error error_of(mlstm_status status) {
  switch (status) {
    case MLSTM_OK:
      return Error::Success();
    case MLSTM_INVALID_ARGUMENT:
    case MLSTM_WORKSPACE_TOO_SMALL:
      return Error::InvalidArgument(mlstm_last_error());
    case MLSTM_UNSUPPORTED:
      return Error(ErrorCode::kUnimplemented, mlstm_last_error());
    default:
      return Error::Internal(mlstm_last_error());
  }
}

mlstm_dtype dtype_of(DataType type) {
  switch (type) {
    case DataType::F32:
      return MLSTM_F32;
    case DataType::F64:
      return MLSTM_F64;
    case DataType::BF16:
      return MLSTM_BF16;
    case DataType::F16:
      return MLSTM_F16;
    case DataType::S32:
      return MLSTM_I32;
    case DataType::S64:
      return MLSTM_I64;
    case DataType::U8:
    case DataType::PRED:
      return MLSTM_U8;
    default:
      return -1;  // refused by the library, which names the argument
  }
}

// XLA hands out dense row-major memory. pred[0] stands for an absent array.
mlstm_tensor view(const AnyBuffer& buffer) {
  const auto dims = buffer.dimensions();
  mlstm_tensor result{};
  if (buffer.element_type() == DataType::PRED && dims.size() == 1 && dims[0] == 0) return result;
  result.data = buffer.untyped_data();
  result.dtype = dtype_of(buffer.element_type());
  result.rank = static_cast<int32_t>(dims.size());
  int64_t stride = 1;
  for (size_t dim = std::min<size_t>(dims.size(), 4); dim-- > 0;) {
    result.shape[dim] = dims[dim];
    result.stride[dim] = stride;
    stride *= dims[dim];
  }
  return result;
}

// The members of an argument struct, in the order of a target's operands or results. Trailing ones
// may be left out.
using Members = std::initializer_list<mlstm_tensor*>;

template <class At>
Error bind(Members members, const char* kind, size_t count, At buffer_at) {
  if (count > members.size()) {
    return Error::InvalidArgument(std::string(kind) + ": expected at most " +
                                  std::to_string(members.size()) + ", got " +
                                  std::to_string(count));
  }
  for (size_t index = 0; index < count; ++index) {
    *members.begin()[index] = view(buffer_at(index));
  }
  return Error::Success();
}

// Sizes of a tensor of the wrong rank are asked for too, before the library refuses it.
int64_t size_or_one(const mlstm_tensor& t, int dim) { return dim < t.rank ? t.shape[dim] : 1; }

template <class Integer>
Integer clamped(int64_t value) {
  using Limits = std::numeric_limits<Integer>;
  return static_cast<Integer>(std::clamp<int64_t>(value, Limits::min(), Limits::max()));
}

// A (B, S, NH, ...) array as (B, NH, S, ...).
void put_heads_first(mlstm_tensor& t) {
  if (t.rank < 3) return;
  std::swap(t.shape[1], t.shape[2]);
  std::swap(t.stride[1], t.stride[2]);
}

// What a call gets from XLA.
struct Call {
  ffi::RemainingArgs operands;
  ffi::RemainingRets results;
  ffi::Dictionary attributes;
  mlstm_device device;
  int32_t device_index;
  void* stream;
  std::function<void*(size_t size, size_t alignment)> allocate;

  Error bind_all(Members inputs, Members outputs) const {
    const auto operand = [&](size_t index) { return *operands.get<AnyBuffer>(index); };
    const auto result = [&](size_t index) { return **results.get<AnyBuffer>(index); };
    const Error error = bind(inputs, "operands", operands.size(), operand);
    return error.failure() ? error : bind(outputs, "results", results.size(), result);
  }

  // The problem that the attributes and the tensors describe. `tokens` are the arrays over tokens,
  // put in the library's order if they are in another.
  Error describe(const mlstm_tensor& q, const mlstm_tensor& v, const mlstm_tensor& i,
                 Members tokens, mlstm_problem& p) const {
    int64_t flags = 0, gate = 0, chunk_size = 0;
    bool tokens_first = false;
    size_t known = 0;
    Error error;
    const auto read = [&](const char* name, auto& value) {
      if (!attributes.contains(name)) return;
      ++known;
      const auto given = attributes.get<std::decay_t<decltype(value)>>(name);
      if (given) {
        value = *given;
      } else {
        error = Error::InvalidArgument(std::string(name) + ": " + given.error().message());
      }
    };
    read("flags", flags);
    read("gate", gate);
    read("chunk_size", chunk_size);
    read("qk_scale", p.qk_scale);
    read("eps", p.eps);
    read("tokens_first", tokens_first);
    if (error.failure()) return error;
    if (known != attributes.size()) {
      return Error::InvalidArgument(
          "attributes: expected none but flags, gate, chunk_size, qk_scale, eps and "
          "tokens_first, got " +
          std::to_string(attributes.size() - known) + " others");
    }
    if (tokens_first) {
      for (mlstm_tensor* t : tokens) put_heads_first(*t);
    }
    p.struct_size = sizeof(p);
    p.b = size_or_one(q, 0);
    p.nh = size_or_one(q, 1);
    p.s = size_or_one(q, 2);
    p.dhqk = size_or_one(q, 3);
    p.dhhv = size_or_one(v, 3);
    p.flags = clamped<uint32_t>(flags);
    p.gate = clamped<int32_t>(gate);
    p.chunk_size = clamped<int32_t>(chunk_size);
    p.device = device;
    p.device_index = device_index;
    p.dtype = q.dtype;
    p.gate_dtype = i.dtype;
    return Error::Success();
  }

  // `function`, with the workspace that was given or else allocated.
  template <class Args>
  Error run(mlstm_op op, mlstm_status (*function)(const Args*), const mlstm_problem& problem,
            const mlstm_tensor& workspace, Args& args) const {
    mlstm_requirements needs{};
    needs.struct_size = sizeof(needs);
    const mlstm_status status = mlstm_query(op, &problem, &needs);
    if (status != MLSTM_OK) return error_of(status);
    if (workspace.rank > 0) {
      args.workspace = workspace.data;
      args.workspace_size = static_cast<size_t>(workspace.shape[0]);
    } else if (needs.workspace_size > 0) {
      args.workspace = allocate(needs.workspace_size, needs.workspace_alignment);
      args.workspace_size = args.workspace ? needs.workspace_size : 0;
    }
    args.struct_size = sizeof(args);
    args.problem = &problem;
    args.stream = stream;
    return error_of(function(&args));
  }
};

Error forward(const Call& call, mlstm_op op, mlstm_status (*function)(const mlstm_fw_args*)) {
  mlstm_fw_args a{};
  mlstm_tensor workspace{};
  mlstm_problem p{};
  Error error = call.bind_all(
      {&a.q, &a.k, &a.v, &a.i, &a.f, &a.c_initial, &a.n_initial, &a.m_initial, &a.cu_seqlens},
      {&a.h, &a.n, &a.m, &a.c_last, &a.n_last, &a.m_last, &workspace});
  if (error.success())
    error = call.describe(a.q, a.v, a.i, {&a.q, &a.k, &a.v, &a.i, &a.f, &a.h, &a.n, &a.m}, p);
  if (error.failure()) return error;
  p.state_dtype = a.c_initial.rank > 0 ? a.c_initial.dtype : a.c_last.dtype;
  if (a.cu_seqlens.rank > 0) p.num_seqs = a.cu_seqlens.shape[0] - 1;
  return call.run(op, function, p, workspace, a);
}

Error backward(const Call& call, mlstm_op op, mlstm_status (*function)(const mlstm_bw_args*)) {
  mlstm_bw_args a{};
  mlstm_tensor workspace{};
  mlstm_problem p{};
  Error error = call.bind_all(
      {&a.q, &a.k, &a.v, &a.i, &a.f, &a.c_initial, &a.n_initial, &a.m_initial, &a.cu_seqlens, &a.h,
       &a.n, &a.m, &a.dh, &a.dc_last, &a.dn_last, &a.dm_last},
      {&a.dq, &a.dk, &a.dv, &a.di, &a.df, &a.dc_initial, &a.dn_initial, &a.dm_initial, &workspace});
  if (error.success())
    error = call.describe(
        a.q, a.v, a.i,
        {&a.q, &a.k, &a.v, &a.i, &a.f, &a.h, &a.n, &a.m, &a.dh, &a.dq, &a.dk, &a.dv, &a.di, &a.df},
        p);
  if (error.failure()) return error;
  p.state_dtype = a.c_initial.rank > 0 ? a.c_initial.dtype : a.dc_last.dtype;
  if (a.cu_seqlens.rank > 0) p.num_seqs = a.cu_seqlens.shape[0] - 1;
  return call.run(op, function, p, workspace, a);
}

Error step(const Call& call, mlstm_op op, mlstm_status (*function)(const mlstm_step_args*)) {
  mlstm_step_args a{};
  mlstm_tensor padding{}, workspace{};  // the former exists to be aliased by h
  mlstm_problem p{};
  Error error = call.bind_all({&a.q, &a.k, &a.v, &a.i, &a.f, &a.c, &a.n, &a.m, &a.src_slots,
                               &a.dst_slots, &a.has_state, &a.num_tokens, &padding},
                              {&a.h, &a.c_dst, &a.n_dst, &a.m_dst, &workspace});
  if (error.success())
    error = call.describe(a.q, a.v, a.i, {&a.q, &a.k, &a.v, &a.i, &a.f, &a.h}, p);
  if (error.failure()) return error;
  p.state_dtype = a.c.dtype;
  p.num_slots = size_or_one(a.c, 0);
  // A result that aliases its operand is updated in place.
  if (a.c_dst.data == a.c.data) a.c_dst = {};
  if (a.n_dst.data == a.n.data) a.n_dst = {};
  if (a.m_dst.data == a.m.data) a.m_dst = {};
  return call.run(op, function, p, workspace, a);
}

template <auto implementation, mlstm_op op, auto function>
Error on_cpu(ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes) {
  std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
  const auto allocate = [&](size_t size, size_t alignment) {
    memory.reset(std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment));
    return memory.get();
  };
  return implementation({operands, results, attributes, MLSTM_DEVICE_CPU, 0, nullptr, allocate}, op,
                        function);
}

// Scratch memory is given back when the call returns, long before the replay of a command buffer
// that has recorded it. Where calls are recorded, the workspace must be a result.
template <auto implementation, mlstm_op op, auto function, bool recorded>
Error on_cuda(ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes,
              void* stream, int32_t device_index, ffi::ScratchAllocator scratch) {
  const auto allocate = [&](size_t size, size_t alignment) {
    // XLA aligns to no more than 16 bytes on demand.
    const std::optional<void*> memory =
        recorded ? std::nullopt : scratch.Allocate(size + alignment - 1);
    const auto address = reinterpret_cast<uintptr_t>(memory.value_or(nullptr));
    return reinterpret_cast<void*>((address + alignment - 1) / alignment * alignment);
  };
  return implementation(
      {operands, results, attributes, MLSTM_DEVICE_CUDA, device_index, stream, allocate}, op,
      function);
}

// Loads the kernels before a call is recorded, when it is too late for that.
Error load_kernels(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary, int32_t device_index) {
  return error_of(mlstm_preload(MLSTM_DEVICE_CUDA, device_index));
}

template <ffi::ExecutionStage stage = ffi::ExecutionStage::kExecute>
auto binding() {
  return ffi::Ffi::Bind<stage>().RemainingArgs().RemainingRets().Attrs();
}

auto binding_cuda() {
  return binding()
      .Ctx<ffi::PlatformStream<void*>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::ScratchAllocator>();
}

}  // namespace

// The handlers of a target and, on CUDA, those of the target that may be recorded.
#define MLSTM_HANDLERS(name, implementation, op)                                              \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name##_cpu, (on_cpu<implementation, op, name>), binding());   \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name##_cuda, (on_cuda<implementation, op, name, false>),      \
                                binding_cuda());                                              \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name##_graph_cuda, (on_cuda<implementation, op, name, true>), \
                                binding_cuda(), {ffi::Traits::kCmdBufferCompatible})

#pragma GCC visibility push(default)
MLSTM_HANDLERS(mlstm_chunkwise_fw, forward, MLSTM_OP_CHUNKWISE_FW);
MLSTM_HANDLERS(mlstm_chunkwise_bw, backward, MLSTM_OP_CHUNKWISE_BW);
MLSTM_HANDLERS(mlstm_parallel_fw, forward, MLSTM_OP_PARALLEL_FW);
MLSTM_HANDLERS(mlstm_parallel_bw, backward, MLSTM_OP_PARALLEL_BW);
MLSTM_HANDLERS(mlstm_step, step, MLSTM_OP_STEP);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    mlstm_load_kernels_cuda, load_kernels,
    binding<ffi::ExecutionStage::kInitialize>().Ctx<ffi::DeviceOrdinal>());
#pragma GCC visibility pop
