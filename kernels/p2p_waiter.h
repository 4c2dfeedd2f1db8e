// Between TensorFlow's cancellation and a wait for a message.
#ifndef SMP_TF_KERNELS_P2P_WAITER_H_
#define SMP_TF_KERNELS_P2P_WAITER_H_

#include <memory>
#include <mutex>
#include <utility>

#include "job.h"
#include "tensorflow/core/framework/cancellation.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace smp {

// Waits for tickets, one after the other, on behalf of one run of an async kernel, and
// ends the wait when TensorFlow cancels the step.
class Waiter : public std::enable_shared_from_this<Waiter> {
 public:
  Waiter(tensorflow::OpKernelContext* context, std::shared_ptr<Job> job)
      : job_(std::move(job)), manager_(context->cancellation_manager()) {
    if (manager_ != nullptr) token_ = manager_->get_cancellation_token();
  }

  // `then` is called exactly once, when the ticket is finished.
  void Wait(const TicketPtr& ticket, Done then) {
    Begin(ticket, [&] { job_->mailbox().Wait(ticket, std::move(then)); });
  }

  // Runs `wait`, after which a step that is cancelled ends the ticket.
  template <typename Start>
  void Begin(const TicketPtr& ticket, Start wait) {
    bool cancelled;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      current_ = ticket;
      cancelled = cancelled_;
    }
    if (!cancelled && manager_ != nullptr && !registered_) {
      registered_ = true;
      auto self = shared_from_this();
      cancelled = !manager_->RegisterCallback(token_, [self] { self->Cancel(); });
    }
    wait();
    if (cancelled) Cancel();
  }

  // To be called before the kernel's done callback: the manager may not outlive it.
  void Finish() {
    if (registered_) manager_->TryDeregisterCallback(token_);
  }

 private:
  void Cancel() {
    TicketPtr ticket;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      cancelled_ = true;
      ticket = current_;
    }
    const Status why = {Code::kCancelled, "the step was cancelled"};
    job_->mailbox().Cancel(ticket, why);
    if (Job::Gpu* gpu = job_->gpu()) gpu->mailbox.Cancel(ticket, why);
  }

  const std::shared_ptr<Job> job_;
  tensorflow::CancellationManager* const manager_;
  tensorflow::CancellationToken token_ = tensorflow::CancellationManager::kInvalidToken;
  bool registered_ = false;
  std::mutex mutex_;
  TicketPtr current_;
  bool cancelled_ = false;
};

}  // namespace smp

#endif  // SMP_TF_KERNELS_P2P_WAITER_H_
