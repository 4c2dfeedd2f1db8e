// What the programs of tests/gpu share: the libraries, and a rank of two with a GPU.
#ifndef SMP_TF_TESTS_GPU_MACHINE_H_
#define SMP_TF_TESTS_GPU_MACHINE_H_

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../../kernels/nccl_transport.h"
#include "../../kernels/tests/processes.h"

namespace smp::testing {

using Way = NcclLane::Way;

// Of CUDA's driver, what the transport does not need.
struct MoreCuda {
  CudaResult (*CtxSynchronize)() = nullptr;
  CudaResult (*StreamSynchronize)(CudaStream) = nullptr;
  CudaResult (*MemcpyHtoD)(CudaAddress, const void* from, size_t bytes) = nullptr;
  CudaResult (*MemcpyDtoH)(void* to, CudaAddress, size_t bytes) = nullptr;
  CudaResult (*MemcpyDtoDAsync)(CudaAddress to, CudaAddress from, size_t bytes,
                                CudaStream) = nullptr;
  CudaResult (*MemsetD8Async)(CudaAddress, unsigned char value, size_t bytes,
                              CudaStream) = nullptr;
};

struct Machine {
  std::string cuda_file = "libcuda.so.1";
  std::string nccl_file = "libnccl.so.2";
  bool small = false;  // for the fakes: less data, fewer rounds

  // --cuda FILE, --nccl FILE, --small
  static Machine FromArguments(int count, char** arguments);
};

// How an operation ends.
class Ending {
 public:
  Done Handler();
  bool IsOver() const;
  Status Await() const;

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    bool over = false;
    Status status;
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

class GpuSide {
 public:
  // Loads the libraries, takes a GPU, and connects both lanes to the other process.
  GpuSide(Process& process, const Machine& machine);
  ~GpuSide();

  Buffer Allocate(size_t bytes);  // freed with its last owner
  void Write(const Buffer& to, const std::string& text);  // waits for the whole device
  std::string Read(const Buffer& from);

  Ending Send(const Buffer& buffer, bool more = false, uint64_t* id = nullptr);
  Ending Recv(const Buffer& buffer, bool more = false, uint64_t* id = nullptr);
  void Join(uint64_t id);  // the stream of computations waits for it
  void Synchronize();      // waits for that stream
  void Check(CudaResult result, const char* what) const;

  // A computation of at least about `seconds`, on its stream; returns at once.
  void Compute(double seconds);

  // What both ranks need to make a communicator of their own.
  NcclId ShareId();

  const Machine& machine() const { return machine_; }
  const Cuda& cuda() const { return cuda_; }
  const Nccl& nccl() const { return nccl_; }
  const MoreCuda& more() const { return more_; }
  NcclTransport& transport() { return *transport_; }
  const std::shared_ptr<GpuDevice>& device() const { return device_; }
  CudaStream stream() const { return stream_; }
  int peer() const { return 1 - process_.rank; }
  Process& process() { return process_; }

 private:
  Process& process_;
  const Machine& machine_;
  const Cuda cuda_;
  const Nccl nccl_;
  MoreCuda more_;
  std::shared_ptr<GpuDevice> device_;
  CudaStream stream_ = nullptr;
  std::unique_ptr<NcclTransport> transport_;
  Buffer scratch_;  // what Compute writes
  int fills_per_second_ = 0;
};

std::string Pattern(size_t bytes, int seed);

}  // namespace smp::testing

#endif  // SMP_TF_TESTS_GPU_MACHINE_H_
