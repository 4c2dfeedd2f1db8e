// What computes on the fake GPU of device.cc: the CPU's kernels. For tests only.
//
// Each operation with kernels for GPUs and for CPUs is given kernels for the fake one:
// with the memory types of those for GPUs, as TensorFlow copies by them, and at their
// place in the order of the stream of computations.
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "stream.h"
#include "tensorflow/core/framework/allocator.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace smp::testing {
namespace {

using namespace tensorflow;

constexpr int kAboveCuda = 1000;  // priorities of TensorFlow's own kernels are lower

class OnStream : public OpKernel {
 public:
  OnStream(OpKernelConstruction* construction, std::unique_ptr<OpKernel> kernel)
      : OpKernel(construction), kernel_(std::move(kernel)) {}

  // A GPU would be given the computation, and wait for what is ahead of it.
  void Compute(OpKernelContext* context) override {
    Computations().Synchronize();
    kernel_->Compute(context);
  }

  bool IsExpensive() override { return kernel_->IsExpensive(); }

 private:
  const std::unique_ptr<OpKernel> kernel_;
};

OpKernel* Make(OpKernelConstruction* construction) {
  absl::Status status;
  std::unique_ptr<OpKernel> kernel =
      CreateOpKernel(DEVICE_CPU, construction->device(), cpu_allocator(),
                     construction->def(), construction->graph_def_version(), &status);
  if (status.ok()) return new OnStream(construction, std::move(kernel));
  construction->SetStatus(status);
  return nullptr;
}

// Of TensorFlow's kernels for GPUs those that touch no data serve here as well: they
// hand tensors on, or run functions.
bool TouchesData(const std::string& op) {
  static const std::set<std::string> none = {
      "Case", "Enter", "Exit", "FakeParam", "For", "Identity", "IdentityN", "If",
      "LoopCond", "Merge", "NextIteration", "NoOp", "PartitionedCall",
      "PreventGradient", "RefEnter", "RefExit", "RefMerge", "RefNextIteration",
      "RefSwitch", "RemoteCall", "StatefulPartitionedCall", "StatelessCase",
      "StatelessIf", "StatelessWhile", "StopGradient", "Switch", "SymbolicGradient",
      "While", "XlaLaunch", "_Arg", "_ArrayToList", "_HostRecv", "_HostSend",
      "_ListToArray", "_Recv", "_Retval", "_Send", "_SwitchN"};
  return none.count(op) == 0;
}

bool RunsOnCpu(const std::string& op) {
  const KernelList kernels = GetRegisteredKernelsForOp(op);
  for (const KernelDef& kernel : kernels.kernel()) {
    if (kernel.device_type() == DEVICE_CPU) return true;
  }
  return false;
}

bool RegisterAll() {
  const KernelList kernels = GetAllRegisteredKernels();
  for (const KernelDef& kernel : kernels.kernel()) {
    if (kernel.device_type() != DEVICE_GPU || !kernel.label().empty()) continue;
    const std::string& op = kernel.op();
    // smp_tf's are what is tested, whether they are loaded by now or later.
    if (op.rfind("Smp", 0) == 0 || !TouchesData(op) || !RunsOnCpu(op)) continue;
    auto* const def = new KernelDef(kernel);
    def->set_priority(kAboveCuda);
    kernel_factory::OpKernelRegistrar(def, "OnStream", Make);
  }
  return true;
}

const bool registered = RegisterAll();

}  // namespace
}  // namespace smp::testing
