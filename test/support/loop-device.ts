/** Block devices of the host for tests: loop devices on files. */
import { execFileSync } from 'node:child_process';
import { closeSync, ftruncateSync, openSync, readFileSync } from 'node:fs';

export interface LoopDevice extends Disposable {
  /** Its node. */
  readonly device: string;
  /** The file that it is made of. */
  readonly file: string;
  readonly major: number;
  readonly minor: number;
}

/** A device of so many bytes on a new, sparse file. */
export function loopDevice(file: string, bytes: number): LoopDevice {
  const fd = openSync(file, 'wx', 0o600);
  ftruncateSync(fd, bytes);
  closeSync(fd);
  const losetup = (...args: string[]) => execFileSync('losetup', args, { encoding: 'utf8' }).trim();
  const device = losetup('--find', '--show', file);
  const number = readFileSync(`/sys/class/block/${device.slice('/dev/'.length)}/dev`, 'utf8').trim();
  const [major = 0, minor = 0] = number.split(':').map(Number);
  return { device, file, major, minor, [Symbol.dispose]: () => void losetup('--detach', device) };
}
