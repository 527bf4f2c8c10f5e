// The kernels of the program, by name, with how each wants to be launched.
#ifndef MLSTM_TESTS_EMULATOR_KERNELS_H
#define MLSTM_TESTS_EMULATOR_KERNELS_H

#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "fibers.h"
#include "report.h"

namespace emu {

struct Kernel {
  int32_t rows, columns, threads, shared;  // MLSTM_GEOMETRY
  std::function<void(const void*)> run;    // with its arguments
};

inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

inline const Kernel& kernel_named(const std::string& name) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) fail("no kernel " + name);
  return found->second;
}

// A static variable of this type adds one.
struct AddKernel {
  template <typename Args>
  AddKernel(const char* name, void (*kernel)(Args), Kernel geometry) {
    geometry.run = [=](const void* args) { kernel(*static_cast<const Args*>(args)); };
    kernels()[name] = geometry;
  }
};

template <typename Args>
void launch(const std::string& name, int64_t blocks, const Args& args) {
  const Kernel& kernel = kernel_named(name);
  launch(name.c_str(), blocks, kernel.threads, static_cast<uint32_t>(kernel.shared),
         [&] { kernel.run(&args); });
}

}  // namespace emu

#endif
