// How the emulator ends a run that went wrong.
#ifndef MLSTM_TESTS_EMULATOR_REPORT_H
#define MLSTM_TESTS_EMULATOR_REPORT_H

#include <cstdint>
#include <string>

namespace emu {

// Where the caller was called from: functions that kernels call are never inlined, so that this is
// a line of the kernel.
#define EMU_CALLER __builtin_return_address(0)

[[gnu::format(printf, 1, 2)]] std::string text(const char* format, ...);

// The source line of a program counter, and those that it was inlined into.
std::string place(void* pc);

// What the program is about, to be printed with every failure.
inline std::string running;

// Prints the message, which thread it was and where it stands, and ends the program.
[[noreturn]] void fail(const std::string& message);

[[noreturn]] void unsupported(const char* instruction);

// A shared address, for messages.
std::string shared_name(uint32_t address);

// Accesses beyond tensors and stacks end with a report as well.
void catch_signals();

}  // namespace emu

#endif
