/* Start of a RISC-V machine under QEMU without firmware: stack, memory, semihosting. */
#include "semihosting.h"

extern uint32_t bss_start, bss_end;
int main(void);
void start(void);

__asm__(".section .vectors\n.globl entry\nentry:\n\tla sp, stack_top\n\tj start\n.text\n");

int32_t semihosting(int32_t operation, const void *block)
{
    register int32_t a0 __asm__("a0") = operation;
    register const void *a1 __asm__("a1") = block;
    __asm__ volatile(".balign 16\n\t.option push\n\t.option norvc\n\tslli x0, x0, 0x1f\n\tebreak\n\tsrai x0, x0, 7\n\t.option pop"
                     : "+r"(a0) : "r"(a1) : "memory");
    return a0;
}

void start(void)
{
    for (uint32_t *to = &bss_start; to < &bss_end;) {
        *to++ = 0;
    }
    leave(main());
}
