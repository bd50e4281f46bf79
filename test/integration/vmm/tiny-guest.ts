/**
 * Guests of some ten instructions, which any KVM runs that Firecracker runs on. They say words on the serial port, and reboot
 * through the keyboard controller (FAQ.md of Firecracker; osdev's "8042": command 0xFE).
 */

/** Where it is loaded: 16 MiB, as Linux is. */
const address = 0x100_0000;
const headerBytes = 0x1000;

/** Says a word, waits a moment, and reboots. @returns an ELF file as a kernel of x86-64 has to be for the 64-bit boot protocol */
export function tinyGuest(word: string): Buffer {
  return kernel([...say(word), ...whileTheStartIsAnswered]);
}

/** Says a word, waits until a key is pressed (SendCtrlAltDel of Firecracker's API), says another word, and reboots. */
export function waitingGuest(word: string, afterwards: string): Buffer {
  const untilKey = [0xe4, 0x64, 0xa8, 0x01, 0x74, 0xfa]; // 1: in $0x64, %al; test $1, %al; jz 1b
  return kernel([...say(word), ...untilKey, ...say(afterwards)]);
}

/**
 * Writes to the boot timer, 123 to 0xC0000000, which it has to map first: Firecracker maps the first GiB, by tables at 0x9000,
 * 0xA000 and 0xB000 (src/vmm/src/arch/x86_64/regs.rs, setup_page_tables). Then as `tinyGuest`.
 */
export function timedGuest(word: string): Buffer {
  return kernel([
    ...[0xc7, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0x83, 0x00, 0x00, 0xc0], // movl $0xc0000083, 0x200000: 2 MiB, writable
    ...[0xc7, 0x04, 0x25, 0x18, 0xa0, 0x00, 0x00, 0x03, 0x00, 0x20, 0x00], // movl $0x200003, 0xa018: the table above
    ...[0xbf, 0x00, 0x00, 0x00, 0xc0], // mov $0xc0000000, %edi
    ...[0xc6, 0x07, 0x7b], // movb $123, (%rdi)
    ...say(word),
    ...whileTheStartIsAnswered,
  ]);
}

/** Says a byte a hundred thousand times, and reboots. */
export function noisyGuest(word: string): Buffer {
  return kernel([
    ...[0xb9, 0xa0, 0x86, 0x01, 0x00], // mov $100000, %ecx
    ...[0x66, 0xba, 0xf8, 0x03, 0xb0, word.charCodeAt(0)], // mov $0x3f8, %dx; mov $byte, %al
    ...[0xee, 0xff, 0xc9, 0x75, 0xfb], // 1: out %al, %dx; dec %ecx; jnz 1b
  ]);
}

/** Each write to a port nobody has is a round trip to Firecracker. */
const whileTheStartIsAnswered = [
  ...[0xb9, 0x00, 0x40, 0x00, 0x00], // mov $0x4000, %ecx
  ...[0xe6, 0x80, 0xff, 0xc9, 0x75, 0xfa], // 1: out %al, $0x80; dec %ecx; jnz 1b
];

function say(word: string): number[] {
  return [
    ...[0x66, 0xba, 0xf8, 0x03], // mov $0x3f8, %dx: COM1
    ...[...Buffer.from(`${word}\n`)].flatMap((byte) => [0xb0, byte, 0xee]), // mov $byte, %al; out %al, %dx
  ];
}

function kernel(instructions: readonly number[]): Buffer {
  const reboot = [
    ...[0xb0, 0xfe, 0xe6, 0x64], // mov $0xfe, %al; out %al, $0x64
    ...[0xf4, 0xeb, 0xfd], // 1: hlt; jmp 1b
  ];
  const code = Buffer.from([...instructions, ...reboot]);
  return Buffer.concat([header(code.length), code]);
}

/** elf(5): Elf64_Ehdr and one Elf64_Phdr. */
function header(codeBytes: number): Buffer {
  const elf = Buffer.alloc(headerBytes);
  elf.set([0x7f, 0x45, 0x4c, 0x46, 2, 1, 1]); // 64 bits, little-endian, version 1
  elf.writeUInt16LE(2, 16); // ET_EXEC
  elf.writeUInt16LE(62, 18); // EM_X86_64
  elf.writeUInt32LE(1, 20);
  elf.writeBigUInt64LE(BigInt(address), 24); // entry
  elf.writeBigUInt64LE(64n, 32); // program headers
  elf.writeUInt16LE(64, 52);
  elf.writeUInt16LE(56, 54);
  elf.writeUInt16LE(1, 56);
  const [type, flags, offset, vaddr, paddr, filesz, memsz, align] = [64, 68, 72, 80, 88, 96, 104, 112];
  elf.writeUInt32LE(1, type); // PT_LOAD
  elf.writeUInt32LE(5, flags); // read, execute
  elf.writeBigUInt64LE(BigInt(headerBytes), offset);
  for (const field of [vaddr, paddr]) elf.writeBigUInt64LE(BigInt(address), field);
  for (const field of [filesz, memsz]) elf.writeBigUInt64LE(BigInt(codeBytes), field);
  elf.writeBigUInt64LE(0x1000n, align);
  return elf;
}
