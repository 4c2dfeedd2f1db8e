// The little that the tests of the engine need: checks, and ranks as real processes.
#ifndef SMP_TF_KERNELS_TESTS_TESTING_H_
#define SMP_TF_KERNELS_TESTS_TESTING_H_

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "../job.h"

// Both end the process: a test that has failed has nothing more to say.
#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::cerr << __FILE__ << ":" << __LINE__ << ": not true: " #condition << "\n"; \
      std::_Exit(1);                                                                 \
    }                                                                                \
  } while (false)

#define CHECK_EQ(actual, expected)                                                  \
  do {                                                                              \
    const auto& smp_actual = (actual);                                              \
    const auto& smp_expected = (expected);                                          \
    if (!(smp_actual == smp_expected)) {                                            \
      std::cerr << __FILE__ << ":" << __LINE__ << ": " #actual " is " << smp_actual \
                << ", expected " << smp_expected << "\n";                           \
      std::_Exit(1);                                                                \
    }                                                                               \
  } while (false)

namespace smp::testing {

// One rank of a test, in a process of its own.
class Rank {
 public:
  int rank = 0;
  int size = 1;
  Job::Options options;  // to be changed before Join

  // Opens a job, exchanges addresses over sockets, connects and starts.
  Status Join(std::unique_ptr<Job>* job);
  Status JoinWithoutStart(std::unique_ptr<Job>* job);

  // Returns once every rank has called it; not a message of the job.
  void Meet();

  // Sends, or receives and gives, bytes; they must succeed.
  void Send(Job& job, int peer, uint32_t channel, const std::string& text);
  std::string Recv(Job& job, int peer, uint32_t channel, size_t bytes);

  // How a receive ends.
  Status TryRecv(Job& job, int peer, uint32_t channel, size_t bytes = 4);

 private:
  friend void RunRanks(const char*, int, const std::function<void(Rank&)>&,
                       const std::vector<int>&);
  std::vector<std::string> Exchange(const std::string& mine);
  std::vector<int> sockets_;  // to each peer
};

// Runs `body` in `size` processes and checks how each ended: with exit code 0, or
// killed by the signal that `signals` has for it.
void RunRanks(const char* name, int size, const std::function<void(Rank&)>& body,
              const std::vector<int>& signals = {});

double Now();  // seconds

Buffer TextBuffer(const std::string& text);

// How `ticket` ends; waits as a kernel does.
Status Await(Job& job, const TicketPtr& ticket);

}  // namespace smp::testing

#endif  // SMP_TF_KERNELS_TESTS_TESTING_H_
