# The program that takes the place of /init in an initramfs: it loads kernel modules, then becomes the /init that was there.
# Position-independent, without a stack of its own, with system calls of every Linux from 2.6 on. What follows it is
#   { offset of a path from here, size of that file }…   to load, in this order
#   { offset of a path from here, 0 }                    to become
#   the paths, each ended by a zero byte
# A module that cannot be loaded (it is there already, say) is passed over.
        .globl  _start
_start: mov     %rsp, %rbx              # argc, argv…, 0, envp…
        lea     table(%rip), %r12
        mov     %r12, %r13
next:   mov     (%r13), %rdi
        mov     8(%r13), %r14
        add     $16, %r13
        add     %r12, %rdi
        test    %r14, %r14
        jz      become
        xor     %esi, %esi              # O_RDONLY
        mov     $2, %eax                # open
        syscall
        test    %eax, %eax
        js      next
        mov     %eax, %r15d
        xor     %edi, %edi
        mov     %r14, %rsi
        mov     $1, %edx                # PROT_READ
        mov     $2, %r10d               # MAP_PRIVATE
        mov     %r15, %r8
        xor     %r9d, %r9d
        mov     $9, %eax                # mmap
        syscall
        mov     %rax, %rdi
        mov     %r14, %rsi
        lea     none(%rip), %rdx        # no parameters
        mov     $175, %eax              # init_module: takes an address that is none for an error of its own
        syscall
        mov     %r15d, %edi
        mov     $3, %eax                # close
        syscall
        jmp     next
become: lea     8(%rbx), %rsi
        mov     (%rbx), %rax
        lea     16(%rbx,%rax,8), %rdx
        mov     $59, %eax               # execve
        syscall
        mov     %eax, %edi
        neg     %edi
        mov     $60, %eax               # exit: the kernel says that init has died, and with what
        syscall
none:   .byte   0
        .balign 8
table:
