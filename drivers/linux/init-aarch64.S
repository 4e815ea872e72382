// What init-x86_64.S does, for ARM's 64-bit machines: it loads kernel modules, then becomes the /init that was there.
// Position-independent, without a stack of its own, with system calls of every Linux from 3.7 on. The table is the same.
        .globl  _start
_start: mov     x19, sp                 // argc, argv…, 0, envp…
        adr     x20, table
        mov     x21, x20
next:   ldp     x1, x22, [x21], #16
        add     x1, x1, x20
        cbz     x22, become
        mov     x0, #-100               // AT_FDCWD
        mov     x2, #0                  // O_RDONLY
        mov     x8, #56                 // openat
        svc     #0
        tbnz    x0, #63, next
        mov     x23, x0
        mov     x4, x0
        mov     x0, #0
        mov     x1, x22
        mov     x2, #1                  // PROT_READ
        mov     x3, #2                  // MAP_PRIVATE
        mov     x5, #0
        mov     x8, #222                // mmap
        svc     #0
        mov     x1, x22
        adr     x2, none                // no parameters
        mov     x8, #105                // init_module: takes an address that is none for an error of its own
        svc     #0
        mov     x0, x23
        mov     x8, #57                 // close
        svc     #0
        b       next
become: mov     x0, x1
        add     x1, x19, #8
        ldr     x2, [x19]
        add     x2, x19, x2, lsl #3
        add     x2, x2, #16
        mov     x8, #221                // execve
        svc     #0
        neg     x0, x0
        mov     x8, #93                 // exit: the kernel says that init has died, and with what
        svc     #0
none:   .byte   0
        .balign 8
table:
