// The point-to-point kernels for tensors in the memory of a GPU, over NCCL.
//
// None of them waits for the device, nor lets it wait longer than the data takes: a send
// waits, on a stream of its own, for what the stream of computations has been given so
// far, and the stream of computations waits for a receive where its tensor is read.
// They are built without CUDA: what they need of it is in gpu_device.h.
#include <atomic>
#include <memory>
#include <string>
#include <utility>

#include "job.h"
#include "p2p_tensors.h"
#include "p2p_waiter.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace smp {
namespace {

using tensorflow::AsyncOpKernel;
using tensorflow::OpKernel;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

// Posts the receive of a tensor; one whose shape is not known takes its place in the
// order, and gets its memory when its header has come over the host.
absl::Status Post(OpKernelContext* context, const std::shared_ptr<Job>& job,
                  const Attributes& attributes, bool hold) {
  Mailbox& mailbox = job->gpu()->mailbox;
  Delivery delivery = {StreamOf(context), attributes.more, hold};
  if (attributes.is_static) {
    Buffer buffer;
    TF_RETURN_IF_ERROR(Allocate(context, attributes, &buffer));
    return ToAbsl(mailbox.PostRecv(attributes.route, Part::kPayload, std::move(buffer),
                                   context->step_id(), delivery));
  }
  delivery.reserve = true;
  const auto arrival = std::make_shared<Tensor>();
  TicketPtr ticket;
  TF_RETURN_IF_ERROR(ToAbsl(
      mailbox.PostRecv(attributes.route, Part::kPayload, {nullptr, 0, arrival},
                       context->step_id(), delivery, &ticket)));
  const auto header = std::make_shared<Header>();
  tensorflow::Allocator* const allocator =
      context->device()->GetAllocator(tensorflow::AllocatorAttributes());
  job->mailbox()
      .Recv(attributes.route, Part::kPayload, BufferOf(header))
      ->OnFinish([job, attributes, header, arrival, ticket,
                  allocator](const Status& status) {
        NcclTransport& transport = job->gpu()->transport;
        if (!status.ok()) return transport.Cancel(ticket->id(), status);
        TensorShape shape;
        absl::Status error = ShapeOf(attributes, *header, ticket->Describe(), &shape);
        if (error.ok()) {
          // On the thread that all messages over the host need: where there is no
          // memory, they must not wait until there is some.
          const tensorflow::AllocationAttributes at_once(
              /*retry_on_failure=*/false, /*allocation_will_be_logged=*/false, nullptr);
          *arrival = Tensor(allocator, attributes.dtype, shape, at_once);
          if (!arrival->IsInitialized() && shape.num_elements() > 0) {
            error = absl::ResourceExhaustedError(
                "no memory for a tensor that arrives; shape=" + shape.DebugString() +
                ": " + ticket->Describe());
          }
        }
        if (!error.ok()) {
          return transport.Cancel(ticket->id(),
                                  {Code::kDataLoss, std::string(error.message())});
        }
        const auto bytes = arrival->tensor_data();
        transport.Fill(ticket->id(),
                       {const_cast<char*>(bytes.data()), bytes.size(), arrival});
      });
  return absl::OkStatus();
}

class GpuSendPostOp : public WithAttributes<OpKernel> {
 public:
  using WithAttributes::WithAttributes;

  void Compute(OpKernelContext* context) override {
    std::shared_ptr<Job> job;
    Job::Gpu* gpu = nullptr;
    OP_REQUIRES_OK(context, FindGpu(&job, &gpu));
    const Timeline::Start start = attributes_.Begin();
    const Tensor& tensor = context->input(0);
    OP_REQUIRES_OK(context, CheckShape(attributes_, tensor));
    if (!attributes_.is_static) {
      OP_REQUIRES_OK(context, ToAbsl(job->mailbox().PostSend(
                                  attributes_.route, nullptr,
                                  BufferOf(HeaderOf(tensor, tensor.TotalBytes())))));
    }
    Buffer payload = BufferOf(tensor);
    Done sent;
    if (start.run != 0) {
      sent = [start, bytes = payload.bytes](const Status& status) {
        if (status.ok()) GetTimeline().End(start, bytes);
      };
    }
    OP_REQUIRES_OK(context,
                   ToAbsl(gpu->mailbox.PostSend(attributes_.route, nullptr,
                                                std::move(payload), std::move(sent),
                                                {StreamOf(context), attributes_.more})));
  }
};

// A receive that waits keeps the device busy, and CUDA loads the code of a kernel when
// it is first launched, for which it may wait until the device is idle (lazy loading,
// the default since 12.2). So what is computed between a receive and its reader must
// have run once before a receive may be under way meanwhile: the first is held back.
class GpuRecvPostOp : public WithAttributes<OpKernel> {
 public:
  using WithAttributes::WithAttributes;

  void Compute(OpKernelContext* context) override {
    const Timeline::Start start = attributes_.Begin();
    std::shared_ptr<Job> job;
    Job::Gpu* gpu = nullptr;
    OP_REQUIRES_OK(context, FindGpu(&job, &gpu));
    OP_REQUIRES_OK(context, Post(context, job, attributes_, !has_run_.exchange(true)));
    GetTimeline().End(start, 0);
  }

 private:
  std::atomic<bool> has_run_{false};
};

class GpuRecvWaitOp : public WithAttributes<AsyncOpKernel> {
 public:
  using WithAttributes::WithAttributes;

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    const Timeline::Start start = attributes_.Begin();
    std::shared_ptr<Job> job;
    Job::Gpu* gpu = nullptr;
    OP_REQUIRES_OK_ASYNC(context, FindGpu(&job, &gpu), done);
    Posted posted = gpu->mailbox.Take(attributes_.route);
    if (!posted.ticket) {
      OP_REQUIRES_OK_ASYNC(context, Post(context, job, attributes_, /*hold=*/false),
                           done);
      posted = gpu->mailbox.Take(attributes_.route);
    }
    const auto waiter = std::make_shared<Waiter>(context, job);
    auto told = [context, waiter, posted, start,
                 done = std::move(done)](const Status& told) {
      waiter->Finish();
      const TicketPtr& ticket = posted.ticket;
      const Status status = ticket->finished() ? ticket->status() : told;
      if (status.ok()) {
        const auto tensor = std::static_pointer_cast<Tensor>(posted.owner);
        GetTimeline().End(start, tensor->TotalBytes());
        context->set_output(0, *tensor);
      } else {
        context->SetStatus(ToAbsl(status));
      }
      done();
    };
    waiter->Begin(posted.ticket, [&] {
      gpu->mailbox.Expect(posted.ticket);
      gpu->transport.Join(posted.ticket->id(), StreamOf(context), std::move(told));
    });
  }
};

REGISTER_KERNEL_BUILDER(Name("SmpSendPost").Device(tensorflow::DEVICE_GPU),
                        GpuSendPostOp);
REGISTER_KERNEL_BUILDER(Name("SmpRecvPost").Device(tensorflow::DEVICE_GPU),
                        GpuRecvPostOp);
REGISTER_KERNEL_BUILDER(Name("SmpRecvWait").Device(tensorflow::DEVICE_GPU),
                        GpuRecvWaitOp);

}  // namespace
}  // namespace smp
