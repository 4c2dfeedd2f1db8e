// A communicator of the fake NCCL, and the work that it does on streams: bytes through
// rings in shared memory. For tests only.
#ifndef SMP_TF_KERNELS_TESTS_FAKE_COMM_H_
#define SMP_TF_KERNELS_TESTS_FAKE_COMM_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fake_nccl.h"

namespace smp {

// From one rank to another one. A message is its size, then its bytes.
struct FakeRing {
  static constexpr uint64_t kBytes = 1 << 19;

  std::atomic<int> sender_called, receiver_called;
  std::atomic<uint64_t> written, read;  // so far
  char data[kBytes];

  uint64_t Write(const char* from, uint64_t bytes);  // as much as there is room for
  uint64_t Read(char* to, uint64_t bytes);           // null: thrown away
};

// What the ranks of a communicator have in common; begins as zeros.
struct FakeBoard {
  std::atomic<int> size, arrived;
  std::atomic<int> taken[64];  // by rank
  FakeRing rings[1];           // [kind][from][to], kinds as below
};

class FakeComm {
 public:
  static constexpr int kMaxRanks = 64;
  enum Kind { kMessages, kSums, kKinds };

  ~FakeComm();

  // Returns once all ranks are there.
  NcclResult Open(const std::string& name, int size, int rank);

  FakeRing* Ring(Kind kind, int from, int to) const {
    return &board_->rings[(kind * size_ + from) * size_ + to];
  }

  int size() const { return size_; }
  int rank() const { return rank_; }

  std::atomic<bool> aborted{false};
  std::atomic<int> pending{0};  // work on streams
  std::atomic<int> unsettled{0};  // how often it still says that a call is in progress

 private:
  FakeBoard* board_ = nullptr;
  size_t bytes_ = 0;
  int size_ = 0;
  int rank_ = -1;
};

// Bytes on their way into a ring, or out of one.
struct FakeMove {
  FakeRing* ring;
  bool sends;
  char* data;
  uint64_t bytes;

  uint64_t header_moved = 0;
  uint64_t moved = 0;
  uint64_t arriving = 0;  // what the sender says that it is
  bool over = false;

  bool Step();  // whether anything moved
};

// Of an allreduce: what the ranks have sent, and where the sum goes.
struct FakeSum {
  std::vector<std::vector<char>> parts;  // by rank; its own is `from`
  const void* from;
  void* to;
  size_t count;
  NcclType type;

  void Add() const;
};

// What goes on a stream at once: all of it makes progress side by side, apart from
// moves through the same ring.
struct FakeLaunch {
  std::shared_ptr<FakeComm> comm;
  CudaStream stream = nullptr;
  std::vector<FakeMove> moves;
  std::vector<std::unique_ptr<FakeSum>> sums;
  int operations = 0;

  // The first message through a ring keeps its caller until the other end has called
  // as well; false: the communicator was given up meanwhile.
  void Announce();
  bool AwaitPeers();

  void Run();  // on the stream; until it is over, or given up
};

size_t SizeOfFakeType(NcclType type);  // 0: a type that is not faked

extern std::atomic<int> fake_mismatches;

// Sleeps a little longer each time.
class FakePause {
 public:
  void Wait();

 private:
  int count_ = 0;
};

// Takes away the files of communicators that never became complete.
void ForgetFakeBoards();

}  // namespace smp

#endif  // SMP_TF_KERNELS_TESTS_FAKE_COMM_H_
