// A forward as the library's host code makes it (src/cuda/hopper.rs): random inputs, outputs and
// workspace that are NaN before, and the kernels' launches.
#ifndef MLSTM_TESTS_EMULATOR_CALL_H
#define MLSTM_TESTS_EMULATOR_CALL_H

#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda.h"
#include "kernels.h"
#include "params.cuh"

#include "backward_sm90.cuh"
#include "forward_shape_sm90.cuh"

// The same numbers from a seed on every machine.
class Random {
 public:
  Random(uint64_t seed, uint64_t stream) : engine_(seed * 0x9e3779b97f4a7c15u + stream) {}

  int64_t below(int64_t count) {
    return static_cast<int64_t>(engine_() % static_cast<uint64_t>(count));
  }
  bool one_in(int64_t count) { return below(count) == 0; }
  double uniform(double low, double high) {
    return low + (high - low) * static_cast<double>(engine_() >> 11) * 0x1p-53;
  }

 private:
  std::mt19937_64 engine_;
};

// Numbers of a type, at first NaN. Pages that cannot be accessed lie before them and right after.
class Array {
 public:
  Array() = default;
  Array(mlstm::DType type, int64_t count);
  Array(const Array&) = delete;
  Array(Array&& other) { *this = std::move(other); }
  Array& operator=(Array&& other);
  ~Array();

  void* data() const { return data_; }
  int64_t count() const { return count_; }
  double get(int64_t index) const;
  void set(int64_t index, double x);
  void fill(Random& random, double low, double high);

 private:
  mlstm::DType type_ = mlstm::kF32;
  int64_t count_ = 0;
  void* data_ = nullptr;
};

struct Problem {
  int64_t b, nh, s, dhqk, dhhv;
  mlstm::DType type, gate_type, state_type;
  bool exponential, normalize;
  bool initial, last;  // has such states
  bool writes_n, writes_m;
  bool token_major;              // (B, S, NH, D) in memory, not (B, NH, S, D)
  bool wide_offsets;             // int64
  std::vector<int64_t> lengths;  // of packed sequences, of which s is the sum and b is 1
  int segments;
  int resets, ignored;  // tokens with f, with i, of minus infinity
  bool poisoned;        // NaN in states that are forgotten, or in a packed sequence

  std::string description() const;
};

struct Call {
  Problem p;
  int64_t rows;  // of states: B, or packed sequences
  int64_t chunks_per_row, num_chunks;
  Array q, k, v, h, i, f, n, m;
  struct States {
    Array c, n, m;
  } initial, last;
  mlstm::Args args = {};

  Call(const Problem& problem, Random& random);

  // A row's tokens within its batch row.
  int64_t first(int64_t row) const { return starts_[static_cast<size_t>(row)]; }
  int64_t length(int64_t row) const;
  int64_t batch(int64_t row) const { return p.lengths.empty() ? row : 0; }
  // Where a token's `d` numbers of a tensor start.
  int64_t place(int64_t b, int64_t head, int64_t t, int64_t d) const;
  int64_t token(int64_t b, int64_t head, int64_t t) const { return (b * p.nh + head) * p.s + t; }

  void make_chunk_table();
  // The vectors of all chunks, by the kernel of this name, or by three ("").
  void make_vectors(const std::string& whole);
  void make_segment_states();
  void forward(const std::string& kernel);

  const float* vectors(int64_t chunk, int64_t head) const;
  // h as (B, NH, S, DHHV).
  Array dense_h() const;

 private:
  void make_inputs(Random& random);
  void make_args();
  void make_workspace();
  const char* type_name() const { return p.type == mlstm::kF16 ? "f16" : "bf16"; }
  mlstm::Tensor tensor(const Array& array, int64_t d) const;
  mlstm::TensorMap map(const mlstm::Tensor& tensor, int64_t d, int64_t slabs) const;
  mlstm::TensorMap vectors_map(int64_t from, int64_t to) const;

  std::vector<int64_t> starts_;
  Array offsets_, chunks_, first_chunk_, seq_starts_, chunk_gates_, packed_;
  Array segment_c_, segment_n_, segment_g_;
};

#endif
