import type { FileHandle } from 'node:fs/promises';

/** Position and value of s_magic in an ext4 superblock (fs/ext4/ext4.h); the superblock begins at byte 1024. */
const magicPosition = 1024 + 0x38;
const magicValue = 0xef53;

export async function isExt4(file: FileHandle): Promise<boolean> {
  const magic = Buffer.alloc(2);
  await file.read(magic, 0, 2, magicPosition);
  return magic.readUInt16LE() === magicValue;
}
