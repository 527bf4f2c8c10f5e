#include "call.h"

#include <algorithm>

#include <sys/mman.h>
#include <unistd.h>

using namespace mlstm;

// ---- arrays

namespace {

int64_t size_of(DType type) { return type == kF64 ? 8 : type == kF32 ? 4 : 2; }
size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
size_t whole_pages(size_t bytes) { return (bytes + page_size() - 1) / page_size() * page_size(); }

// In steps of 16, by which the copy engine goes.
size_t array_bytes(DType type, int64_t count) {
  return static_cast<size_t>((count * size_of(type) + 15) / 16 * 16);
}

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

}  // namespace

Array::Array(DType type, int64_t count) : type_(type), count_(count) {
  const size_t bytes = array_bytes(type, count), pages = whole_pages(bytes), guard = page_size();
  void* memory = mmap(nullptr, pages + 2 * guard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) emu::fail("no memory for an array");
  auto first = static_cast<unsigned char*>(memory) + guard;
  mprotect(first, pages, PROT_READ | PROT_WRITE);
  memset(first, 0xff, pages);
  data_ = first + (pages - bytes);
}
Array& Array::operator=(Array&& other) {
  std::swap(type_, other.type_);
  std::swap(count_, other.count_);
  std::swap(data_, other.data_);
  return *this;
}
Array::~Array() {
  if (data_ == nullptr) return;
  const size_t bytes = array_bytes(type_, count_), pages = whole_pages(bytes);
  munmap(static_cast<unsigned char*>(data_) + bytes - pages - page_size(), pages + 2 * page_size());
}

double Array::get(int64_t index) const {
  switch (type_) {
    case kF32:
      return static_cast<const float*>(data_)[index];
    case kF64:
      return static_cast<const double*>(data_)[index];
    case kBf16:
      return emu::bf16_float(static_cast<const uint16_t*>(data_)[index]);
    default:
      return emu::f16_float(static_cast<const uint16_t*>(data_)[index]);
  }
}
void Array::set(int64_t index, double x) {
  const auto single = static_cast<float>(x);
  switch (type_) {
    case kF32:
      static_cast<float*>(data_)[index] = single;
      break;
    case kF64:
      static_cast<double*>(data_)[index] = x;
      break;
    case kBf16:
      static_cast<uint16_t*>(data_)[index] = emu::float_bf16(single);
      break;
    default:
      static_cast<uint16_t*>(data_)[index] = emu::float_f16(single);
      break;
  }
}
void Array::fill(Random& random, double low, double high) {
  for (int64_t x = 0; x < count_; ++x) set(x, random.uniform(low, high));
}

// ---- problems

std::string Problem::description() const {
  const auto name = [](DType x) { return x == kF32 ? "f32" : x == kF16 ? "f16" : "bf16"; };
  std::string out = emu::text("B %ld, NH %ld, S %ld, DHQK %ld, DHHV %ld", b, nh, s, dhqk, dhhv);
  if (!lengths.empty()) out += ", packed";
  for (int64_t length : lengths) out += emu::text(" %ld", length);
  out += exponential ? ", exponential" : normalize ? ", sigmoid" : ", sigmoid not normalised";
  if (segments > 1) out += emu::text(", %d segments", segments);
  if (initial) out += ", initial states";
  if (last) out += ", last states";
  if (token_major) out += ", token-major";
  if (poisoned) out += ", NaN";
  out += emu::text(", gates %s, states %s", name(gate_type), name(state_type));
  return out + emu::text(", %d resets, %d tokens ignored", resets, ignored);
}

// ---- calls

Call::Call(const Problem& problem, Random& random) : p(problem) {
  rows = p.lengths.empty() ? p.b : static_cast<int64_t>(p.lengths.size());
  int64_t start = 0;
  for (int64_t row = 0; row <= rows; ++row) {
    starts_.push_back(start);
    if (!p.lengths.empty() && row < rows) start += length(row);
  }
  chunks_per_row = ceil_div(p.s, 64);
  num_chunks = p.lengths.empty() ? chunks_per_row * p.b : chunks_per_row + rows;
  make_inputs(random);
  make_args();
  make_workspace();
}

int64_t Call::length(int64_t row) const {
  return p.lengths.empty() ? p.s : p.lengths[static_cast<size_t>(row)];
}
int64_t Call::place(int64_t b, int64_t head, int64_t t, int64_t d) const {
  return p.token_major ? ((b * p.s + t) * p.nh + head) * d : token(b, head, t) * d;
}

void Call::make_inputs(Random& random) {
  const int64_t tokens = p.b * p.nh * p.s, heads = rows * p.nh;
  q = Array(p.type, tokens * p.dhqk);
  k = Array(p.type, tokens * p.dhqk);
  v = Array(p.type, tokens * p.dhhv);
  i = Array(p.gate_type, tokens);
  f = Array(p.gate_type, tokens);
  for (Array* array : {&q, &k, &v}) array->fill(random, -2, 2);
  i.fill(random, -4, 3);
  f.fill(random, -2, 8);
  for (int x = 0; x < p.resets && tokens > 0; ++x) f.set(random.below(tokens), -INFINITY);
  for (int x = 0; x < p.ignored && tokens > 0; ++x) i.set(random.below(tokens), -INFINITY);
  for (States* states : {&initial, &last}) {
    states->c = Array(p.state_type, heads * p.dhqk * p.dhhv);
    states->n = Array(kF32, heads * p.dhqk);
    states->m = Array(kF32, heads);
  }
  initial.c.fill(random, -1, 1);
  initial.n.fill(random, -1, 1);
  initial.m.fill(random, -2, 2);
  h = Array(p.type, tokens * p.dhhv);
  n = Array(kF32, tokens);
  m = Array(kF32, tokens);
  if (!p.poisoned) return;
  if (!p.lengths.empty()) {
    // A sequence's NaN is no business of the next ones'.
    const int64_t row = random.below(rows);
    for (int64_t head = 0; head < p.nh; ++head) {
      for (int64_t t = first(row); t < first(row) + length(row); ++t) {
        for (int64_t d = 0; d < p.dhqk; ++d) k.set(place(0, head, t, p.dhqk) + d, NAN);
        for (int64_t d = 0; d < p.dhhv; ++d) v.set(place(0, head, t, p.dhhv) + d, NAN);
      }
    }
  } else if (p.initial && p.s > 0) {
    for (int64_t x = 0; x < initial.c.count(); ++x) initial.c.set(x, NAN);
    for (int64_t x = 0; x < initial.n.count(); ++x) initial.n.set(x, NAN);
    const int64_t t = random.below(std::min<int64_t>(p.s, 100));
    for (int64_t head = 0; head < heads; ++head) f.set(head * p.s + t, -INFINITY);
  }
}

Tensor Call::tensor(const Array& array, int64_t d) const {
  const auto stride = [&](int64_t b, int64_t head, int64_t t) { return place(b, head, t, d); };
  return {array.data(), stride(1, 0, 0), stride(0, 1, 0), stride(0, 0, 1)};
}

void Call::make_args() {
  Args& a = args;
  a.s = p.s;
  a.num_chunks = num_chunks;
  a.b = static_cast<int32_t>(p.b);
  a.nh = static_cast<int32_t>(p.nh);
  a.rows = static_cast<int32_t>(rows);
  a.dhqk = static_cast<int32_t>(p.dhqk);
  a.dhhv = static_cast<int32_t>(p.dhhv);
  a.chunk_len = 64;
  a.chunks_per_row = static_cast<int32_t>(chunks_per_row);
  a.flags = (p.exponential ? kExponential : 0) | (p.normalize ? kNormalize : 0);
  a.gate_dtype = p.gate_type;
  a.state_dtype = p.state_type;
  a.vector_ok = 1;
  a.write_m = p.exponential && p.writes_m;
  a.qk_scale = 1 / std::sqrt(static_cast<double>(p.dhqk));
  a.eps = 1e-6;
  a.q = tensor(q, p.dhqk);
  a.k = tensor(k, p.dhqk);
  a.v = tensor(v, p.dhhv);
  a.h = tensor(h, p.dhhv);
  const auto vector = [&](const Array& array) { return Tensor{array.data(), p.nh * p.s, p.s, 1}; };
  a.i = vector(i);
  a.f = vector(f);
  if (p.writes_n) a.n = vector(n);
  if (a.write_m != 0) a.m = vector(m);
  const auto put = [&](const States& states, Tensor& c, Tensor& n_state, Tensor& m_state) {
    c = {states.c.data(), p.nh * p.dhqk * p.dhhv, p.dhqk * p.dhhv, p.dhhv};
    n_state = {states.n.data(), p.nh * p.dhqk, p.dhqk, 0};
    if (p.exponential) m_state = {states.m.data(), p.nh, 1, 0};
  };
  if (p.initial) put(initial, a.c_initial, a.n_initial, a.m_initial);
  if (p.last) put(last, a.c_last, a.n_last, a.m_last);
  a.segments = p.segments;
  a.group_chunks = 1;
  a.segment_columns = a.dhhv;
}

void Call::make_workspace() {
  chunk_gates_ = Array(kF64, p.nh * num_chunks * 4);
  packed_ = Array(kF32, num_chunks * p.nh * kPackedFloats);
  args.chunk_gates = static_cast<double*>(chunk_gates_.data());
  args.packed = static_cast<float*>(packed_.data());
  const int64_t states = rows * p.nh * (p.segments - 1);
  segment_c_ = Array(kF32, states * p.dhqk * p.dhhv);
  segment_n_ = Array(kF32, states * p.dhqk);
  segment_g_ = Array(kF32, states);
  args.segment_c = static_cast<float*>(segment_c_.data());
  args.segment_n = static_cast<float*>(segment_n_.data());
  args.segment_g = static_cast<float*>(segment_g_.data());
  if (p.lengths.empty()) return;
  // Integers, in arrays of numbers as wide.
  offsets_ = Array(p.wide_offsets ? kF64 : kF32, rows + 1);
  for (int64_t row = 0; row <= rows; ++row) {
    if (p.wide_offsets) {
      static_cast<int64_t*>(offsets_.data())[row] = first(row);
    } else {
      static_cast<int32_t*>(offsets_.data())[row] = static_cast<int32_t>(first(row));
    }
  }
  chunks_ = Array(kF64, num_chunks * 2);
  first_chunk_ = Array(kF64, rows + 1);
  seq_starts_ = Array(kF64, rows + 1);
  args.cu_seqlens = offsets_.data();
  args.cu_seqlens_stride = 1;
  args.cu_seqlens_wide = p.wide_offsets;
  args.chunks = static_cast<const Chunk*>(chunks_.data());
  args.first_chunk = static_cast<const int64_t*>(first_chunk_.data());
  args.seq_starts = static_cast<int64_t*>(seq_starts_.data());
}

// ---- launches

namespace {

// src/cuda/maps.rs has the same.
TensorMap encoded(const emu::Map& map) { return std::bit_cast<TensorMap>(emu::checked(map)); }

// src/dispatch.rs and src/cuda/layout.rs have the same.
int64_t hopper_rows(int64_t rows, int64_t columns) {
  return (rows <= 64 && columns <= 128) || columns > 256 ? 64 : 128;
}
int64_t padded(int64_t dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : dim <= 256 ? 256 : 512; }

}  // namespace

TensorMap Call::map(const Tensor& t, int64_t d, int64_t slabs) const {
  const auto bytes = [](int64_t stride) { return static_cast<uint64_t>(2 * stride); };
  const auto size = [](int64_t x) { return static_cast<uint64_t>(x); };
  emu::Map map = {};
  map.data = static_cast<unsigned char*>(t.data);
  map.rank = 5;
  map.element = 2;
  map.swizzled = true;
  map.sizes[0] = map.boxes[0] = map.boxes[1] = 64;
  map.boxes[2] = static_cast<uint16_t>(slabs);
  map.boxes[3] = map.boxes[4] = 1;
  map.sizes[1] = size(p.s);
  map.sizes[2] = size(d / 64);
  map.sizes[3] = size(p.nh);
  map.sizes[4] = size(p.b);
  map.strides[0] = bytes(t.stride_s);
  map.strides[1] = 128;
  map.strides[2] = bytes(t.stride_h);
  map.strides[3] = bytes(t.stride_b);
  return encoded(map);
}

// A part, in bytes, of the vectors of each chunk and head.
TensorMap Call::vectors_map(int64_t from, int64_t to) const {
  emu::Map map = {};
  map.data = static_cast<unsigned char*>(packed_.data()) + from;
  map.rank = 2;
  map.element = 8;
  map.boxes[0] = static_cast<uint16_t>((to - from) / 8);
  map.boxes[1] = 1;
  map.sizes[0] = map.boxes[0];
  map.sizes[1] = static_cast<uint64_t>(num_chunks * p.nh);
  map.strides[0] = kPackedFloats * 4;
  return encoded(map);
}

const float* Call::vectors(int64_t chunk, int64_t head) const {
  return args.packed + (chunk * p.nh + head) * kPackedFloats;
}

Array Call::dense_h() const {
  Array out(p.type, h.count());
  for (int64_t b = 0; b < p.b; ++b) {
    for (int64_t head = 0; head < p.nh; ++head) {
      for (int64_t t = 0; t < p.s; ++t) {
        const int64_t from = place(b, head, t, p.dhhv), to = token(b, head, t) * p.dhhv;
        for (int64_t d = 0; d < p.dhhv; ++d) out.set(to + d, h.get(from + d));
      }
    }
  }
  return out;
}

void Call::make_chunk_table() {
  if (!p.lengths.empty()) emu::launch("chunk_table", 1, args);
}

void Call::make_vectors(const std::string& whole) {
  if (!whole.empty()) {
    emu::launch(whole, rows * p.nh, args);
    return;
  }
  // As many warps in a block as its kernel's geometry has rows.
  const auto by_warps = [&](const std::string& name, int64_t items) {
    emu::launch(name, ceil_div(items, emu::kernel_named(name).rows), args);
  };
  if (p.exponential) {
    by_warps("gates_reduce_fast", num_chunks * p.nh);
    by_warps("gates_scan_f32", rows * p.nh);
  }
  by_warps(std::string("gates_pack_") + type_name(), num_chunks * p.nh);
}

// src/cuda/sweeps.rs has the same.
void Call::make_segment_states() {
  if (p.segments == 1) return;
  const int64_t most = std::min<int64_t>(p.dhhv, 256), columns = padded(most);
  const int64_t block = hopper_rows(p.dhqk, most);
  const int64_t blocks = ceil_div(p.dhqk, block) * ceil_div(p.dhhv, columns) * (p.segments - 1);
  BackwardArgs backward = {};
  backward.args = args;
  backward.keys = map(args.v, p.dhhv, columns / 64);
  backward.values = map(args.k, p.dhqk, block / 64);
  backward.vectors = vectors_map(1024, 1552);
  // What this sweep does not use.
  for (TensorMap* other : {&backward.queries, &backward.own, &backward.out, &backward.scores}) {
    *other = backward.values;
  }
  backward.rho = backward.vectors;
  emu::launch(emu::text("segments_c_%s_%ldx%ld", type_name(), block, columns), rows * p.nh * blocks,
              backward);
}

void Call::forward(const std::string& name) {
  const emu::Kernel& kernel = emu::kernel_named(name);
  HopperArgs hopper = {};
  hopper.args = args;
  hopper.q = map(args.q, p.dhqk, kernel.rows / 64);
  hopper.k = map(args.k, p.dhqk, 1);
  hopper.v = map(args.v, p.dhhv, kernel.columns / 64);
  hopper.h = map(args.h, p.dhhv, 1);
  hopper.packed = vectors_map(0, kPackedFloats * 4);
  const int64_t slices = ceil_div(p.dhhv, kernel.columns);
  emu::launch(name, rows * p.nh * slices * p.segments, hopper);
}
