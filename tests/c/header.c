/* The header compiles on its own, and twice. */
#include <mlstm.h>
#include <mlstm.h>

int main(void) { return mlstm_version() == 0; }
