/**
 * Writes the archive that an initrd is: cpio in the "newc" format
 * (Documentation/driver-api/early-userspace/buffer-format.rst).
 *
 * Each entry is a header of ASCII hex fields of eight digits, the name with its NUL, then the data; header+name and
 * data are each padded to four bytes. The entry TRAILER!!! ends the archive. Everything that could differ between two
 * runs (times, owners, inode numbers) is fixed, so the same entries give the same bytes.
 */

export interface CpioEntry {
  /** Path without a leading slash; parents must come before children. */
  name: string;
  /** File type and permissions, e.g. 0o100755 for a program, 0o040755 for a folder (inode(7)). */
  mode: number;
  data?: Buffer;
}

export function cpio(entries: readonly CpioEntry[]): Buffer {
  const parts = entries.map((entry, index) => record(entry, index + 1));
  parts.push(record({ name: 'TRAILER!!!', mode: 0 }, 0));
  return Buffer.concat(parts);
}

function record({ name, mode, data = Buffer.alloc(0) }: CpioEntry, inode: number): Buffer {
  const nameBytes = Buffer.from(`${name}\0`);
  // inode, mode, uid, gid, links, mtime, size, device major and minor, rdev major and minor, name size, checksum
  const fields = [inode, mode, 0, 0, 1, 0, data.length, 0, 0, 0, 0, nameBytes.length, 0];
  const header = Buffer.from(`070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}`);
  return Buffer.concat([pad(Buffer.concat([header, nameBytes])), pad(data)]);
}

function pad(bytes: Buffer): Buffer {
  const missing = (4 - (bytes.length % 4)) % 4;
  return missing === 0 ? bytes : Buffer.concat([bytes, Buffer.alloc(missing)]);
}
