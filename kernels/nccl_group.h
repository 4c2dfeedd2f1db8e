// Sums over a group of ranks: a communicator of all of them.
#ifndef SMP_TF_KERNELS_NCCL_GROUP_H_
#define SMP_TF_KERNELS_NCCL_GROUP_H_

#include <memory>
#include <string>
#include <utility>

#include "nccl_stream.h"

namespace smp {

class NcclGroup : public NcclStream {
 public:
  // `place`: of this rank among the `size` of the group.
  NcclGroup(std::shared_ptr<GpuDevice> device, const Nccl* nccl, int size, int place)
      : NcclStream(std::move(device), nccl), size_(size), place_(place) {}

  Status Connect(const std::string& id) override { return Meet(id, size_, place_); }

  // Bytes of an element; 0 for what is no type of NCCL.
  static size_t SizeOf(int type);

 private:
  Status Put(const Item& item) override;

  const int size_;
  const int place_;
};

}  // namespace smp

#endif  // SMP_TF_KERNELS_NCCL_GROUP_H_
