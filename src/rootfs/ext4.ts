import { readSync } from 'node:fs';

/** Position and value of s_magic in an ext4 superblock (fs/ext4/ext4.h); the superblock begins at byte 1024. */
const magicPosition = 1024 + 0x38;
const magicValue = 0xef53;

/** @param fd of an open file */
export function isExt4(fd: number): boolean {
  const magic = Buffer.alloc(2);
  readSync(fd, magic, 0, 2, magicPosition);
  return magic.readUInt16LE() === magicValue;
}
