// The little that the tests of the engine need: ranks as real processes, with jobs.
#ifndef SMP_TF_KERNELS_TESTS_TESTING_H_
#define SMP_TF_KERNELS_TESTS_TESTING_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../job.h"
#include "processes.h"

namespace smp::testing {

// One rank of a test, in a process of its own.
class Rank : public Process {
 public:
  explicit Rank(const Process& process) : Process(process) {}

  Job::Options options;  // to be changed before Join

  // Opens a job, exchanges addresses over sockets, connects and starts.
  Status Join(std::unique_ptr<Job>* job);
  Status JoinWithoutStart(std::unique_ptr<Job>* job);

  // Sends, or receives and gives, bytes; they must succeed.
  void Send(Job& job, int peer, uint32_t channel, const std::string& text);
  std::string Recv(Job& job, int peer, uint32_t channel, size_t bytes);

  // How a receive ends.
  Status TryRecv(Job& job, int peer, uint32_t channel, size_t bytes = 4);
};

// As RunProcesses does.
void RunRanks(const char* name, int size, const std::function<void(Rank&)>& body,
              const std::vector<int>& signals = {});

Buffer TextBuffer(const std::string& text);

// How `ticket` ends; waits as a kernel does.
Status Await(Job& job, const TicketPtr& ticket);

}  // namespace smp::testing

#endif  // SMP_TF_KERNELS_TESTS_TESTING_H_
