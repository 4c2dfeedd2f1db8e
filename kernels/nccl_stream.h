// A communicator of NCCL, and the stream that its work is on.
#ifndef SMP_TF_KERNELS_NCCL_STREAM_H_
#define SMP_TF_KERNELS_NCCL_STREAM_H_

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "gpu_device.h"
#include "transport.h"

namespace smp {

class NcclStream {
 public:
  // Work that is ready to go; `before` is what it has to wait for.
  struct Item {
    Buffer buffer;
    GpuEvent before;
    Sum sum;  // of an allreduce
  };

  NcclStream(std::shared_ptr<GpuDevice> device, const Nccl* nccl)
      : device_(std::move(device)), nccl_(nccl) {}
  virtual ~NcclStream();

  // Meets the others, who must call it with the same id, and moves a first byte,
  // because NCCL connects at the first message and keeps its caller waiting for that.
  // It may wait for ever; Abort, from another thread, does not end that.
  virtual Status Connect(const std::string& id) = 0;

  // Puts work on the stream, as one; never waits for it. `after` is when all of it is
  // over. From one thread at a time.
  Status Launch(const std::vector<Item>& items, GpuEvent* after);

  // What NCCL's own threads have run into.
  Status AsyncError();

  // Ends what is on the stream, and the communicator, from any thread. Only the first
  // call counts. Also when nothing is left to end: ncclCommDestroy may wait for the
  // other ranks of the host, which may be gone. NCCL frees memory then, for which CUDA
  // waits until every stream of the device is done: it may take as long as the others.
  void Abort();
  bool HasEnded() const { return has_ended_; }

 protected:
  // As rank `place` of `size`, and with one byte, or number, to try it.
  Status Meet(const std::string& id, int size, int place);

  virtual Status Put(const Item& item) = 0;

  Status Check(NcclResult result, const char* what) const;

  const std::shared_ptr<GpuDevice> device_;
  const Nccl* const nccl_;
  NcclComm comm_ = nullptr;
  CudaStream stream_ = nullptr;

 private:
  // Waits for a call that goes on in NCCL's own thread, as they do with
  // NCCL_COMM_BLOCKING=0; as the others do, it may wait for ever, until Abort.
  Status Settle(NcclResult result, const char* what);

  CudaAddress first_ = 0;  // the first byte
  std::mutex ending_;
  bool ended_ = false;
  std::atomic<bool> has_ended_{false};
};

}  // namespace smp

#endif  // SMP_TF_KERNELS_NCCL_STREAM_H_
