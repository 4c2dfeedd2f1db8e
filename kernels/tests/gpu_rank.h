// What the tests of the NCCL transport need: a rank with a GPU, over the fake
// libraries.
#ifndef SMP_TF_KERNELS_TESTS_GPU_RANK_H_
#define SMP_TF_KERNELS_TESTS_GPU_RANK_H_

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../nccl_transport.h"
#include "fake_cuda.h"
#include "fake_nccl.h"
#include "processes.h"

namespace smp::testing {

using Way = NcclLane::Way;

// The two libraries, and what they can be asked besides. They lie next to the test.
struct FakeLibraries {
  FakeLibraries();

  FakeCudaCounts CudaCounts() const;
  FakeNcclCounts NcclCounts() const;

  Cuda cuda;
  Nccl nccl;
  decltype(&cuLaunchHostFunc) launch;
  decltype(&fake_nccl_inject) inject;
  decltype(&fake_nccl_refuse) refuse;

 private:
  decltype(&fake_cuda_counts) cuda_counts_;
  decltype(&fake_nccl_counts) nccl_counts_;
};

// Of this process; loaded when it is first asked for, as that starts threads.
const FakeLibraries& Fakes();

// How an operation ends; it fails the test if it does so twice.
class Outcome {
 public:
  Done Handler();
  bool IsOver() const;
  Status Await() const;  // fails the test if it takes too long

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    int calls = 0;
    Status status;
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

// Memory, and whether anyone still keeps it.
class Memory {
 public:
  Memory(size_t bytes, int seed);

  static std::string Pattern(size_t bytes, int seed);

  // From then on only those who were given the buffer keep it.
  Buffer Give() { return std::exchange(buffer_, {}); }
  const Buffer& buffer() const { return buffer_; }
  std::string Text() const;
  bool IsKept() const { return !watch_.expired(); }

 private:
  Buffer buffer_;
  std::weak_ptr<void> watch_;
};

// Keeps a stream until it is opened. Calls put behind it run in its order.
class Gate {
 public:
  explicit Gate(CudaStream stream);
  ~Gate() { Open(); }
  void Open();

 private:
  class Latch;
  const std::shared_ptr<Latch> latch_;
};

void PutOnStream(CudaStream stream, std::function<void()> call);
void Synchronize(CudaStream stream);

class GpuRank {
 public:
  explicit GpuRank(Process& process);

  // Closes, and checks that nothing is left and that no rule was broken.
  ~GpuRank();

  // All lanes between all ranks.
  void Connect();
  Status ConnectGroup(const std::vector<int>& ranks, int* group);

  Message To(int peer, Buffer buffer, bool more = false) const;
  Outcome Send(int peer, Buffer buffer, bool more = false);
  Outcome Recv(int peer, Buffer buffer, bool more = false);
  Outcome Reserve(int peer, uint64_t* id);

  // Whether `ready` becomes true in good time.
  static bool Eventually(const std::function<bool()>& ready);

  std::vector<std::string> failures();
  NcclTransport& transport() { return *transport_; }
  CudaStream compute() const { return compute_; }
  const std::shared_ptr<GpuDevice>& device() const { return device_; }

 private:
  Process& process_;
  std::shared_ptr<GpuDevice> device_;
  CudaStream compute_ = nullptr;
  std::mutex mutex_;
  std::vector<std::string> failures_;
  std::unique_ptr<NcclTransport> transport_;
};

}  // namespace smp::testing

#endif  // SMP_TF_KERNELS_TESTS_GPU_RANK_H_
