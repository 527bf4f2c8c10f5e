// SPDX-License-Identifier: MIT OR Apache-2.0
//
// torch.ops.mlstm: the functions of mlstm.h as PyTorch operators, on LibTorch's stable ABI, so
// that one build serves every Python and every torch from 2.10 on. This file converts and
// allocates; what is computed and what is refused is decided behind mlstm.h. Fake kernels,
// autograd and autocast are registered from Python (mlstm/torch/_ops.py).
//
// Shapes: q, k (B, NH, S, DHQK); v, h (B, NH, S, DHHV); i, f, n, m (B, NH, S); states
// C (R, NH, DHQK, DHHV), n (R, NH, DHQK), m (R, NH), where R is B or, with cu_seqlens (R + 1),
// the number of packed sequences. An output that does not exist is a tensor of size (0).

#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION 0x020a000000000000  // torch 2.10, the oldest one served
#endif

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <mlstm.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

// Only a torch built with CUDA has it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<ScalarType>;

// A RuntimeError in Python, whatever the kind: torch 2.15 has no other for an extension.
void check(mlstm_status status) {
  if (status != MLSTM_OK) throw std::runtime_error(mlstm_last_error());
}

mlstm_dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return MLSTM_F32;
    case ScalarType::Double:
      return MLSTM_F64;
    case ScalarType::BFloat16:
      return MLSTM_BF16;
    case ScalarType::Half:
      return MLSTM_F16;
    case ScalarType::Int:
      return MLSTM_I32;
    case ScalarType::Long:
      return MLSTM_I64;
    case ScalarType::Byte:
    case ScalarType::Bool:
      return MLSTM_U8;
    default:
      return -1;  // refused by the library, which names the argument
  }
}

// Sizes of a tensor of the wrong rank are asked for too, before the library refuses it.
int64_t size_or_one(const Tensor& t, int64_t dim) { return dim < t.dim() ? t.size(dim) : 1; }

struct Options {
  bool siging = false;
  bool normalize = true;
  bool detach_denominator = false;
  std::optional<double> qk_scale;
  double eps = 0;
  int64_t chunk_size = 0;
  bool allow_tf32 = false;
  bool generic_engine = false;
};

// The device that a call runs on; nothing else in this file depends on which one it is.
struct Place {
  mlstm_device device = MLSTM_DEVICE_CPU;
  int32_t index = 0;
  void* stream = nullptr;
  int32_t torch_type, torch_index;

  explicit Place(const Tensor& q) : torch_type(type_of(q)), torch_index(q.get_device_index()) {
    if (!q.is_cuda()) return;
    device = MLSTM_DEVICE_CUDA;
    index = torch_index;
    if (!aoti_torch_get_current_cuda_stream) {
      throw std::runtime_error("device: this torch was built without CUDA");
    }
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  }

  bool holds(const Tensor& t) const {
    return type_of(t) == torch_type && t.get_device_index() == torch_index;
  }

  static int32_t type_of(const Tensor& t) {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    return type;
  }
};

struct States {
  Tensor c, n, m;
};

// One call of the library: its problem, views of its tensors, and the memory it needs meanwhile.
class Call {
 public:
  Call(const Tensor& q, const Tensor& v, const Tensor& i, const Options& options)
      : compute(q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        place_(q) {
    problem.struct_size = sizeof(problem);
    problem.b = size_or_one(q, 0);
    problem.nh = size_or_one(q, 1);
    problem.s = size_or_one(q, 2);
    problem.dhqk = size_or_one(q, 3);
    problem.dhhv = size_or_one(v, 3);
    problem.qk_scale = options.qk_scale.value_or(0);
    problem.eps = options.eps;
    problem.flags = (options.normalize ? 0 : MLSTM_FLAG_NO_NORMALIZE) |
                    (options.detach_denominator ? MLSTM_FLAG_DETACH_DENOMINATOR : 0) |
                    (options.eps == 0 ? MLSTM_FLAG_NO_EPS : 0) |
                    (options.allow_tf32 ? MLSTM_FLAG_ALLOW_TF32 : 0) |
                    (options.generic_engine ? MLSTM_FLAG_GENERIC_ENGINE : 0);
    problem.gate = options.siging ? MLSTM_GATE_SIGMOID : MLSTM_GATE_EXP;
    problem.device = place_.device;
    problem.device_index = place_.index;
    problem.dtype = dtype_of(q.scalar_type());
    problem.gate_dtype = dtype_of(i.scalar_type());
    problem.chunk_size = static_cast<int32_t>(
        std::clamp<int64_t>(options.chunk_size, std::numeric_limits<int32_t>::min(),
                            std::numeric_limits<int32_t>::max()));
  }

  // An input of any strides.
  mlstm_tensor in(const char* name, const Tensor& t) const {
    // Pointers do not tell the library where they point.
    if (!place_.holds(t)) {
      throw std::runtime_error(std::string(name) + ".device: expected that of q, got another");
    }
    return view(t, t.const_data_ptr());
  }

  // An input whose last dimension must be dense.
  mlstm_tensor in_dense(const char* name, const Tensor& t) {
    const int64_t last = t.dim() - 1;
    if (last < 0 || t.stride(last) == 1 || t.size(last) <= 1) return in(name, t);
    copies_.push_back(torch::stable::contiguous(t));
    return in(name, copies_.back());
  }

  mlstm_tensor in(const char* name, const OptionalTensor& t) const {
    return t ? in(name, *t) : mlstm_tensor{};
  }

  mlstm_tensor in_dense(const char* name, const OptionalTensor& t) {
    return t ? in_dense(name, *t) : mlstm_tensor{};
  }

  // A tensor that is written in place.
  mlstm_tensor in_out(const char* name, const Tensor& t) const {
    mlstm_tensor result = in(name, t);
    result.data = t.mutable_data_ptr();
    return result;
  }

  // An output that was allocated here.
  static mlstm_tensor out(const Tensor& t) { return view(t, t.mutable_data_ptr()); }

  void pack(const OptionalTensor& cu_seqlens) {
    if (cu_seqlens) problem.num_seqs = size_or_one(*cu_seqlens, 0) - 1;
  }

  // Dense, unless dimensions 1 and 2 are to be swapped in memory. Not torch::stable::new_empty,
  // which looks its operator up by name every time.
  Tensor empty(IntHeaderOnlyArrayRef shape, ScalarType type, bool swapped = false) const {
    int64_t size[4], stride[4], step = 1;
    // More dimensions are refused by the library in a moment.
    const auto dims = std::min<int64_t>(static_cast<int64_t>(shape.size()), 4);
    for (int64_t next = dims - 1; next >= 0; --next) {
      const int64_t dim = swapped && (next == 1 || next == 2) ? 3 - next : next;
      size[dim] = shape[dim];
      stride[dim] = step;
      step *= std::max<int64_t>(size[dim], 1);
    }
    const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, size, stride, code, place_.torch_type,
                                                    place_.torch_index, &handle));
    return Tensor(handle);
  }

  Tensor empty_if(bool exists, IntHeaderOnlyArrayRef shape, ScalarType type) const {
    return exists ? empty(shape, type) : empty({0}, type);
  }

  // States of R rows, or in a step of all slots.
  States empty_states(bool exist, bool with_m, ScalarType c_type) const {
    const mlstm_problem& p = problem;
    const int64_t rows = p.num_slots > 0 ? p.num_slots : p.num_seqs > 0 ? p.num_seqs : p.b;
    return {empty_if(exist, {rows, p.nh, p.dhqk, p.dhhv}, c_type),
            empty_if(exist, {rows, p.nh, p.dhqk}, compute),
            empty_if(exist && with_m, {rows, p.nh}, compute)};
  }

  // Dense, (B, NH, S, D) or (B, NH, S); in memory (B, S, NH, D) if `like` is a view of that kind.
  Tensor empty_tokens(const Tensor& like, IntHeaderOnlyArrayRef shape, ScalarType type) const {
    const bool by_token = like.dim() >= 3 && like.stride(1) < like.stride(2) && like.stride(1) > 0;
    return empty(shape, type, by_token);
  }

  Tensor empty_like_tokens(const Tensor& like) const {
    return empty_tokens(like, like.sizes(), like.scalar_type());
  }

  template <class Args>
  void run(mlstm_op op, mlstm_status (*function)(const Args*), Args& args) {
    // Most tensors are aligned. Where some are not, the library asks for a larger workspace.
    const uint32_t flags = problem.flags;
    problem.flags = flags | MLSTM_FLAG_ALIGNED;
    mlstm_status status = try_to_run(op, function, args);
    if (status == MLSTM_WORKSPACE_TOO_SMALL) {
      problem.flags = flags;
      status = try_to_run(op, function, args);
    }
    check(status);
  }

  mlstm_problem problem{};
  ScalarType compute;  // of n and m

 private:
  // Workspace for `op`, then `function`.
  template <class Args>
  mlstm_status try_to_run(mlstm_op op, mlstm_status (*function)(const Args*), Args& args) {
    mlstm_requirements needs{};
    needs.struct_size = sizeof(needs);
    check(mlstm_query(op, &problem, &needs));
    if (needs.workspace_size > 0) {
      const size_t slack = needs.workspace_alignment - 1;
      workspace_ = empty({static_cast<int64_t>(needs.workspace_size + slack)}, ScalarType::Byte);
      const auto start = reinterpret_cast<uintptr_t>(workspace_->mutable_data_ptr());
      args.workspace = reinterpret_cast<void*>((start + slack) & ~slack);
      args.workspace_size = needs.workspace_size;
    }
    args.struct_size = sizeof(args);
    args.problem = &problem;
    args.stream = place_.stream;
    return function(&args);
  }

  static mlstm_tensor view(const Tensor& t, const void* data) {
    mlstm_tensor result{};
    result.data = const_cast<void*>(data);
    result.dtype = dtype_of(t.scalar_type());
    const auto sizes = t.sizes(), strides = t.strides();
    result.rank = static_cast<int32_t>(sizes.size());
    for (size_t dim = 0; dim < std::min<size_t>(sizes.size(), 4); ++dim) {
      result.shape[dim] = sizes[dim];
      result.stride[dim] = strides[dim];
    }
    return result;
  }

  Place place_;
  std::optional<Tensor> workspace_;
  std::vector<Tensor> copies_;
};

// Arguments with the inputs that all functions share.
template <class Args>
Args token_args(Call& call, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i,
                const Tensor& f) {
  Args args{};
  args.q = call.in_dense("q", q);
  args.k = call.in_dense("k", k);
  args.v = call.in_dense("v", v);
  args.i = call.in("i", i);
  args.f = call.in("f", f);
  return args;
}

// Arguments with the inputs that forward and backward share.
template <class Args>
Args sequence_args(Call& call, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i,
                   const Tensor& f, const OptionalTensor& c_initial,
                   const OptionalTensor& n_initial, const OptionalTensor& m_initial,
                   const OptionalTensor& cu_seqlens) {
  auto args = token_args<Args>(call, q, k, v, i, f);
  args.c_initial = call.in_dense("c_initial", c_initial);
  args.n_initial = call.in_dense("n_initial", n_initial);
  args.m_initial = call.in("m_initial", m_initial);
  args.cu_seqlens = call.in("cu_seqlens", cu_seqlens);
  return args;
}

// h, n, m, c_last, n_last, m_last; n (N) and m per token are for the backward.
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResult forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i,
                      const Tensor& f, const OptionalTensor& c_initial,
                      const OptionalTensor& n_initial, const OptionalTensor& m_initial,
                      const OptionalTensor& cu_seqlens, bool parallel, bool siging, bool normalize,
                      bool detach_denominator, std::optional<double> qk_scale, double eps,
                      int64_t chunk_size, bool allow_tf32, bool generic_engine,
                      OptionalType state_dtype, bool return_last_states) {
  Call call(q, v, i,
            {siging, normalize, detach_denominator, qk_scale, eps, chunk_size, allow_tf32,
             generic_engine});
  mlstm_problem& p = call.problem;
  call.pack(cu_seqlens);
  const ScalarType state =
      state_dtype ? *state_dtype : (c_initial ? c_initial->scalar_type() : call.compute);
  p.state_dtype = dtype_of(state);

  auto args = sequence_args<mlstm_fw_args>(call, q, k, v, i, f, c_initial, n_initial, m_initial,
                                           cu_seqlens);

  const Tensor h = call.empty_tokens(v, {p.b, p.nh, p.s, p.dhhv}, q.scalar_type());
  const Tensor n = call.empty_if(normalize, {p.b, p.nh, p.s}, call.compute);
  const Tensor m = call.empty_if(!siging, {p.b, p.nh, p.s}, call.compute);
  const States last = call.empty_states(return_last_states, !siging, state);
  args.h = Call::out(h);
  if (normalize) args.n = Call::out(n);
  if (!siging) args.m = Call::out(m);
  if (return_last_states) {
    args.c_last = Call::out(last.c);
    args.n_last = Call::out(last.n);
    if (!siging) args.m_last = Call::out(last.m);
  }
  if (parallel) {
    call.run(MLSTM_OP_PARALLEL_FW, mlstm_parallel_fw, args);
  } else {
    call.run(MLSTM_OP_CHUNKWISE_FW, mlstm_chunkwise_fw, args);
  }
  return {h, n, m, last.c, last.n, last.m};
}

// dq, dk, dv, di, df, dc_initial, dn_initial, dm_initial.
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardResult backward(const Tensor& dh, const OptionalTensor& dc_last,
                        const OptionalTensor& dn_last, const OptionalTensor& dm_last,
                        const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i,
                        const Tensor& f, const OptionalTensor& c_initial,
                        const OptionalTensor& n_initial, const OptionalTensor& m_initial,
                        const OptionalTensor& cu_seqlens, const Tensor& h, const Tensor& n,
                        const Tensor& m, bool parallel, bool siging, bool normalize,
                        bool detach_denominator, std::optional<double> qk_scale, double eps,
                        int64_t chunk_size, bool allow_tf32, bool generic_engine,
                        bool initial_gradients) {
  Call call(q, v, i,
            {siging, normalize, detach_denominator, qk_scale, eps, chunk_size, allow_tf32,
             generic_engine});
  mlstm_problem& p = call.problem;
  call.pack(cu_seqlens);
  const OptionalTensor& any_c = c_initial ? c_initial : dc_last;
  const ScalarType state = any_c ? any_c->scalar_type() : call.compute;
  p.state_dtype = dtype_of(state);

  auto args = sequence_args<mlstm_bw_args>(call, q, k, v, i, f, c_initial, n_initial, m_initial,
                                           cu_seqlens);
  if (normalize) args.h = call.in_dense("h", h);
  if (normalize) args.n = call.in("n", n);
  if (!siging) args.m = call.in("m", m);
  args.dh = call.in_dense("dh", dh);
  args.dc_last = call.in_dense("dc_last", dc_last);
  args.dn_last = call.in_dense("dn_last", dn_last);
  args.dm_last = call.in("dm_last", dm_last);

  const Tensor dq = call.empty_like_tokens(q), dk = call.empty_like_tokens(k),
               dv = call.empty_like_tokens(v), di = call.empty_like_tokens(i),
               df = call.empty_like_tokens(f);
  args.dq = Call::out(dq);
  args.dk = Call::out(dk);
  args.dv = Call::out(dv);
  args.di = Call::out(di);
  args.df = Call::out(df);

  const States initial = call.empty_states(initial_gradients, !siging, state);
  if (initial_gradients) {
    args.dc_initial = Call::out(initial.c);
    args.dn_initial = Call::out(initial.n);
    if (!siging) args.dm_initial = Call::out(initial.m);
  }
  if (parallel) {
    call.run(MLSTM_OP_PARALLEL_BW, mlstm_parallel_bw, args);
  } else {
    call.run(MLSTM_OP_CHUNKWISE_BW, mlstm_chunkwise_bw, args);
  }
  return {dq, dk, dv, di, df, initial.c, initial.n, initial.m};
}

// Inputs that `step` and `step_` share.
mlstm_step_args step_args(Call& call, const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& i, const Tensor& f, const Tensor& c) {
  call.problem.state_dtype = dtype_of(c.scalar_type());
  call.problem.num_slots = size_or_one(c, 0);
  return token_args<mlstm_step_args>(call, q, k, v, i, f);
}

// h and the new c, n, m.
using StepResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

StepResult step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
                const Tensor& c, const Tensor& n, const OptionalTensor& m, bool siging,
                bool normalize, std::optional<double> qk_scale, double eps) {
  Call call(q, v, i, {siging, normalize, false, qk_scale, eps});
  const mlstm_problem& p = call.problem;
  mlstm_step_args args = step_args(call, q, k, v, i, f, c);
  args.c = call.in_dense("c", c);
  args.n = call.in_dense("n", n);
  args.m = call.in("m", m);

  const Tensor h = call.empty_tokens(v, {p.b, p.nh, p.s, p.dhhv}, q.scalar_type());
  const States next = call.empty_states(true, m.has_value(), c.scalar_type());
  args.h = Call::out(h);
  args.c_dst = Call::out(next.c);
  args.n_dst = Call::out(next.n);
  if (m) args.m_dst = Call::out(next.m);
  call.run(MLSTM_OP_STEP, mlstm_step, args);
  return {h, next.c, next.n, next.m};
}

Tensor step_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
             const Tensor& c, const Tensor& n, const OptionalTensor& m,
             const OptionalTensor& src_slots, const OptionalTensor& dst_slots,
             const OptionalTensor& has_state, const OptionalTensor& num_tokens, bool siging,
             bool normalize, std::optional<double> qk_scale, double eps) {
  Call call(q, v, i, {siging, normalize, false, qk_scale, eps});
  const mlstm_problem& p = call.problem;
  mlstm_step_args args = step_args(call, q, k, v, i, f, c);
  args.c = call.in_out("c", c);
  args.n = call.in_out("n", n);
  if (m) args.m = call.in_out("m", *m);
  args.src_slots = call.in("src_slots", src_slots);
  args.dst_slots = call.in("dst_slots", dst_slots);
  args.has_state = call.in("has_state", has_state);
  args.num_tokens = call.in("num_tokens", num_tokens);

  Tensor h = call.empty_tokens(v, {p.b, p.nh, p.s, p.dhhv}, q.scalar_type());
  // The library leaves the h of padding alone.
  if (src_slots || num_tokens) torch::stable::zero_(h);
  args.h = Call::out(h);
  call.run(MLSTM_OP_STEP, mlstm_step, args);
  return h;
}

template <class Library>
void implement(Library& m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("step", TORCH_BOX(&step));
  m.impl("step_", TORCH_BOX(&step_));
}

}  // namespace

STABLE_TORCH_LIBRARY(mlstm, m) {
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c_initial, "
      "Tensor? n_initial, Tensor? m_initial, Tensor? cu_seqlens, *, bool parallel=False, "
      "bool siging=False, bool normalize=True, bool detach_denominator=False, "
      "float? qk_scale=None, float eps=1e-6, int chunk_size=0, bool allow_tf32=False, "
      "bool generic_engine=False, ScalarType? state_dtype=None, bool return_last_states=False) -> "
      "(Tensor h, Tensor n, Tensor m, Tensor c_last, Tensor n_last, Tensor m_last)");
  m.def(
      "backward(Tensor dh, Tensor? dc_last, Tensor? dn_last, Tensor? dm_last, Tensor q, Tensor k, "
      "Tensor v, Tensor i, Tensor f, Tensor? c_initial, Tensor? n_initial, Tensor? m_initial, "
      "Tensor? cu_seqlens, Tensor h, Tensor n, Tensor m, *, bool parallel=False, "
      "bool siging=False, bool normalize=True, bool detach_denominator=False, "
      "float? qk_scale=None, float eps=1e-6, int chunk_size=0, bool allow_tf32=False, "
      "bool generic_engine=False, bool initial_gradients=False) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor di, Tensor df, Tensor dc_initial, "
      "Tensor dn_initial, Tensor dm_initial)");
  m.def(
      "step(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor c, Tensor n, Tensor? m, *, "
      "bool siging=False, bool normalize=True, float? qk_scale=None, float eps=1e-6) -> "
      "(Tensor h, Tensor c, Tensor n, Tensor m)");
  m.def(
      "step_(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor(a!) c, Tensor(b!) n, "
      "Tensor(c!)? m, Tensor? src_slots=None, Tensor? dst_slots=None, Tensor? has_state=None, "
      "Tensor? num_tokens=None, *, bool siging=False, bool normalize=True, float? qk_scale=None, "
      "float eps=1e-6) -> Tensor h");
}

STABLE_TORCH_LIBRARY_IMPL(mlstm, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(mlstm, CUDA, m) { implement(m); }
