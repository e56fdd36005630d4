/* Files of the host, through the debugger's door (Arm semihosting, also spoken by RISC-V). */
#ifndef SEMIHOSTING_H
#define SEMIHOSTING_H

#include <stddef.h>
#include <stdint.h>

int32_t semihosting(int32_t operation, const void *block);
int32_t open_file(const char *name, uint32_t mode);
uint32_t read_file(int32_t file, void *to, uint32_t bytes);
void write_file(int32_t file, const void *from, uint32_t bytes);
void leave(int status);

#endif
