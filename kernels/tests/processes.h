// Checks, and tests that run in several processes. Needs nothing of the engine.
#ifndef SMP_TF_KERNELS_TESTS_PROCESSES_H_
#define SMP_TF_KERNELS_TESTS_PROCESSES_H_

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

// They end the process: a test that has failed has nothing more to say.
#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::cerr << __FILE__ << ":" << __LINE__ << ": not true: " #condition << "\n"; \
      std::_Exit(1);                                                                 \
    }                                                                                \
  } while (false)

// By value: of a temporary, like an element of what a call returned, a reference dangles.
#define CHECK_EQ(actual, expected)                                                  \
  do {                                                                              \
    const auto smp_actual = (actual);                                               \
    const auto smp_expected = (expected);                                           \
    if (!(smp_actual == smp_expected)) {                                            \
      std::cerr << __FILE__ << ":" << __LINE__ << ": " #actual " is " << smp_actual \
                << ", expected " << smp_expected << "\n";                           \
      std::_Exit(1);                                                                \
    }                                                                               \
  } while (false)

#define CHECK_HAS(text, part)                                               \
  do {                                                                      \
    const std::string smp_text = (text);                                    \
    if (smp_text.find(part) == std::string::npos) CHECK_EQ(smp_text, part); \
  } while (false)

namespace smp::testing {

constexpr unsigned kTestSeconds = 60;  // a hang must not outlive this

// One process of a test, which has a socket to each other one.
class Process {
 public:
  int rank = 0;
  int size = 1;

  // Gives what every process has given; its own is empty.
  std::vector<std::string> Exchange(const std::string& mine);

  // Returns once every process has called it.
  void Meet() { Exchange("here"); }

 private:
  friend void RunProcesses(const char*, int, const std::function<void(Process&)>&,
                           const std::vector<int>&);
  std::vector<int> sockets_;  // to each peer
};

// Runs `body` in `size` processes and checks how each ended: with exit code 0, or
// killed by the signal that `signals` has for it.
void RunProcesses(const char* name, int size, const std::function<void(Process&)>& body,
                  const std::vector<int>& signals = {});

double Now();  // seconds

}  // namespace smp::testing

#endif  // SMP_TF_KERNELS_TESTS_PROCESSES_H_
