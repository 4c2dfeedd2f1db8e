// One direction between this rank and another one: a communicator of two.
//
// Messages of a lane arrive in the order in which they are sent, and a message that has
// no receive yet holds up those behind it. Each direction has a lane of its own, so that
// no rank has to agree with another one when it sends and when it receives.
#ifndef SMP_TF_KERNELS_NCCL_LANE_H_
#define SMP_TF_KERNELS_NCCL_LANE_H_

#include <memory>
#include <string>
#include <utility>

#include "nccl_stream.h"

namespace smp {

class NcclLane : public NcclStream {
 public:
  enum class Way { kSend, kRecv };

  NcclLane(std::shared_ptr<GpuDevice> device, const Nccl* nccl, Way way)
      : NcclStream(std::move(device), nccl), way_(way) {}

  Status Connect(const std::string& id) override;

 private:
  Status Put(const Item& item) override;

  const Way way_;
};

}  // namespace smp

#endif  // SMP_TF_KERNELS_NCCL_LANE_H_
