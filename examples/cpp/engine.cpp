// The decode loop of an inference engine in C++17: requests come and go, each with a slot of one
// state pool; every call has the same number of rows, the unused ones padded; draft tokens are
// verified and the accepted ones committed.
//
//   c++ -std=c++17 engine.cpp $(pkg-config --cflags --libs mlstm) -o engine && ./engine

#include <mlstm.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

namespace {

constexpr int kRows = 4, kSlots = 5, kHeads = 2, kKeyDim = 16, kValueDim = 32;
constexpr int kDraft = 4;  // tokens proposed at a time
constexpr int kTokens = 40, kRequests = 9;

void check(mlstm_status status) {
  if (status == MLSTM_OK) return;
  std::fprintf(stderr, "%s: %s\n", mlstm_status_name(status), mlstm_last_error());
  std::exit(1);
}

mlstm_dtype dtype_of(const float*) { return MLSTM_F32; }
mlstm_dtype dtype_of(const int32_t*) { return MLSTM_I32; }

// A dense tensor over a vector.
template <typename T>
mlstm_tensor tensor(std::vector<T>& data, std::initializer_list<int64_t> shape) {
  mlstm_tensor view = {};
  view.data = data.data();
  view.dtype = dtype_of(data.data());
  view.rank = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), view.shape);
  int64_t stride = 1;
  for (int dim = view.rank - 1; dim >= 0; dim--) {
    view.stride[dim] = stride;
    stride *= view.shape[dim];
  }
  return view;
}

// The projections of `tokens` tokens in each of `rows` rows, and the output. Head by head, token by
// token, as the kernels' default layout (B, NH, S, D) has it.
struct Batch {
  int rows, tokens;
  std::vector<float> q, k, v, i, f, h;

  Batch(int row_count, int token_count) : rows(row_count), tokens(token_count) {
    const size_t all = static_cast<size_t>(rows) * kHeads * tokens;
    for (auto* x : {&q, &k}) x->resize(all * kKeyDim);
    for (auto* x : {&v, &h}) x->resize(all * kValueDim);
    for (auto* x : {&i, &f}) x->resize(all);
  }

  mlstm_tensor qk(std::vector<float>& x) { return tensor(x, {rows, kHeads, tokens, kKeyDim}); }
  mlstm_tensor hv(std::vector<float>& x) { return tensor(x, {rows, kHeads, tokens, kValueDim}); }
  mlstm_tensor gate(std::vector<float>& x) { return tensor(x, {rows, kHeads, tokens}); }

  // Where token `t` of head `head` of a row lies in `x`.
  float* at(std::vector<float>& x, int row, int head, int t) {
    const size_t width = x.size() / (static_cast<size_t>(rows) * kHeads * tokens);
    return x.data() + ((static_cast<size_t>(row) * kHeads + head) * tokens + t) * width;
  }

  // Stands for the model: what its layers compute for a request's token at a position.
  void fill(int row, int t, int request, int position) {
    std::minstd_rand random(static_cast<unsigned>(1 + request * 1000 + position));
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (int head = 0; head < kHeads; head++) {
      std::generate_n(at(q, row, head, t), kKeyDim, [&] { return uniform(random); });
      std::generate_n(at(k, row, head, t), kKeyDim, [&] { return uniform(random); });
      std::generate_n(at(v, row, head, t), kValueDim, [&] { return uniform(random); });
      *at(i, row, head, t) = uniform(random) - 1;
      *at(f, row, head, t) = uniform(random) + 3;
    }
  }
};

mlstm_problem problem_of(const Batch& batch) {
  mlstm_problem problem = {};
  problem.struct_size = sizeof problem;
  problem.b = batch.rows;
  problem.nh = kHeads;
  problem.s = batch.tokens;
  problem.dhqk = kKeyDim;
  problem.dhhv = kValueDim;
  problem.device = MLSTM_DEVICE_CPU;
  problem.dtype = MLSTM_F32;
  return problem;
}

// Scratch memory for the calls of one shape; allocated once, as CUDA graphs will want it.
class Workspace {
 public:
  Workspace(mlstm_op op, const mlstm_problem& problem) {
    mlstm_requirements needs = {};
    needs.struct_size = sizeof needs;
    check(mlstm_query(op, &problem, &needs));
    size_ = needs.workspace_size;
    memory_.resize(size_ + needs.workspace_alignment);
    data_ = memory_.data();
    size_t space = memory_.size();
    std::align(needs.workspace_alignment, size_, data_, space);
  }
  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::vector<unsigned char> memory_;
  void* data_ = nullptr;
  size_t size_ = 0;
};

// The states of all requests, and the calls that advance them.
class Pool {
 public:
  Pool()
      : c_(kSlots * kHeads * kKeyDim * kValueDim, kDirty),
        n_(kSlots * kHeads * kKeyDim, kDirty),
        m_(kSlots * kHeads, kDirty) {}

  // Which slot each row reads (-1: a padding row), which it writes (-1: none), whether the slot has
  // a state yet, and how many of the batch's tokens count.
  struct Rows {
    std::vector<int32_t> source, target, has_state, tokens;
  };

  void step(Batch& batch, Rows rows) {
    mlstm_problem problem = problem_of(batch);
    problem.num_slots = kSlots;
    if (!workspace_) workspace_ = std::make_unique<Workspace>(MLSTM_OP_STEP, problem);
    mlstm_step_args args = {};
    args.struct_size = sizeof args;
    args.problem = &problem;
    args.workspace = workspace_->data();
    args.workspace_size = workspace_->size();
    args.q = batch.qk(batch.q);
    args.k = batch.qk(batch.k);
    args.v = batch.hv(batch.v);
    args.i = batch.gate(batch.i);
    args.f = batch.gate(batch.f);
    args.h = batch.hv(batch.h);
    args.c = tensor(c_, {kSlots, kHeads, kKeyDim, kValueDim});
    args.n = tensor(n_, {kSlots, kHeads, kKeyDim});
    args.m = tensor(m_, {kSlots, kHeads});
    args.src_slots = tensor(rows.source, {batch.rows});
    args.dst_slots = tensor(rows.target, {batch.rows});
    args.has_state = tensor(rows.has_state, {batch.rows});
    args.num_tokens = tensor(rows.tokens, {batch.rows});
    check(mlstm_step(&args));
  }

 private:
  // Slots are handed out dirty: a row without has_state must not read its own.
  static constexpr float kDirty = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> c_, n_, m_;
  std::unique_ptr<Workspace> workspace_;
};

struct Request {
  int id = -1, slot = -1, position = 0;
  std::vector<float> h;  // (kTokens, kHeads, kValueDim)
};

// The same request in one forward; returns how far the engine's output is from it.
float distance(const Request& request) {
  Batch whole(1, kTokens);
  for (int t = 0; t < kTokens; t++) whole.fill(0, t, request.id, t);
  mlstm_problem problem = problem_of(whole);
  Workspace workspace(MLSTM_OP_CHUNKWISE_FW, problem);
  mlstm_fw_args args = {};
  args.struct_size = sizeof args;
  args.problem = &problem;
  args.workspace = workspace.data();
  args.workspace_size = workspace.size();
  args.q = whole.qk(whole.q);
  args.k = whole.qk(whole.k);
  args.v = whole.hv(whole.v);
  args.i = whole.gate(whole.i);
  args.f = whole.gate(whole.f);
  args.h = whole.hv(whole.h);
  check(mlstm_chunkwise_fw(&args));
  float largest = 0;
  for (int t = 0; t < kTokens; t++) {
    for (int head = 0; head < kHeads; head++) {
      const float* expected = whole.at(whole.h, 0, head, t);
      const float* got = request.h.data() + (t * kHeads + head) * kValueDim;
      // A NaN must not pass, so the comparison is this way round.
      for (int d = 0; d < kValueDim; d++) {
        const float delta = std::fabs(expected[d] - got[d]);
        if (!(delta <= largest)) largest = delta;
      }
    }
  }
  return largest;
}

}  // namespace

int main() {
  Pool pool;
  Batch batch(kRows, kDraft);
  std::vector<Request> running(kRows);
  std::vector<int> free_slots = {0, 1, 2, 3, 4};
  std::minstd_rand random(7);
  int started = 0, finished = 0, calls = 0;
  float worst = 0;

  while (finished < kRequests) {
    for (Request& request : running) {
      // Not every row gets a request at once: some calls have padding rows.
      if (request.id >= 0 || started == kRequests || random() % 3 == 0) continue;
      request = {started++, free_slots.back(), 0, {}};
      request.h.resize(static_cast<size_t>(kTokens) * kHeads * kValueDim);
      free_slots.pop_back();
    }

    Pool::Rows rows;
    for (int row = 0; row < kRows; row++) {
      const Request& request = running[row];
      rows.source.push_back(request.slot);
      rows.target.push_back(-1);
      rows.has_state.push_back(request.position > 0);
      rows.tokens.push_back(std::min(kDraft, kTokens - request.position));
      if (request.id < 0) continue;
      for (int t = 0; t < rows.tokens[row]; t++)
        batch.fill(row, t, request.id, request.position + t);
    }

    // Verify: h of all draft tokens, from which a model would sample; no state is stored.
    pool.step(batch, rows);

    // Accept one to all of them, and commit the state after the last accepted token.
    rows.target = rows.source;
    for (int32_t& tokens : rows.tokens) tokens = 1 + static_cast<int32_t>(random()) % tokens;
    pool.step(batch, rows);
    calls += 2;

    for (int row = 0; row < kRows; row++) {
      Request& request = running[row];
      if (request.id < 0) continue;
      for (int t = 0; t < rows.tokens[row]; t++, request.position++) {
        for (int head = 0; head < kHeads; head++) {
          std::copy_n(batch.at(batch.h, row, head, t), kValueDim,
                      request.h.data() + (request.position * kHeads + head) * kValueDim);
        }
      }
      if (request.position < kTokens) continue;
      const float far = distance(request);
      if (!(far <= worst)) worst = far;
      free_slots.push_back(request.slot);
      request = {};
      finished++;
    }
  }
  std::printf("%d requests of %d tokens in %d calls of %d rows: off by at most %.1e\n", finished,
              kTokens, calls, kRows, worst);
  return !(worst < 1e-4f);
}
