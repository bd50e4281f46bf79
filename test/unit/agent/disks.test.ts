import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { findDisk, findDisks, forgetSize } from '../../../agent/disks.ts';

let root: string;
let block: string;
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'kiln-disks-'));
  block = join(root, 'block');
});
afterEach(() => rmSync(root, { recursive: true }));

/** A virtio disk as sysfs shows it; the driver's files take whatever is written to them. */
function disk(
  name: string,
  { serial, dev = '254:0', sectors = 8 }: { serial: string; dev?: string; sectors?: number },
) {
  const device = join(root, 'devices', `virtio-${name}`);
  const driver = join(root, 'drivers', 'virtio_blk');
  for (const directory of [device, driver, join(block, name)]) mkdirSync(directory, { recursive: true });
  for (const file of ['bind', 'unbind']) writeFileSync(join(driver, file), '');
  symlinkSync(driver, join(device, 'driver'));
  symlinkSync(device, join(block, name, 'device'));
  writeFileSync(join(block, name, 'serial'), serial);
  writeFileSync(join(block, name, 'dev'), `${dev}\n`);
  writeFileSync(join(block, name, 'size'), `${sectors}\n`);
}

const written = (file: string): string => readFileSync(join(root, 'drivers/virtio_blk', file), 'utf8');

describe('disks', () => {
  it('are found by their serials', () => {
    disk('vda', { serial: 'root' });
    disk('vdb', { serial: 'ro0\n' });
    mkdirSync(join(block, 'loop0'));
    expect(findDisk('ro0', block)).toBe('/dev/vdb');
    expect(() => findDisk('rw0', block)).toThrow('no disk with serial "rw0" in the guest (there are: ro0, root)');
  });

  it('are found again where they have other names, and other serials', () => {
    disk('vda', { serial: 'ro0' });
    disk('vdb', { serial: 'rw0' });
    expect([findDisk('ro0', block), findDisk('rw0', block)]).toEqual(['/dev/vda', '/dev/vdb']);
    disk('vdc', { serial: 'ro0' });
    writeFileSync(join(block, 'vda', 'serial'), 'rw0');
    rmSync(join(block, 'vdb'), { recursive: true });
    expect([findDisk('rw0', block), findDisk('ro0', block)]).toEqual(['/dev/vda', '/dev/vdc']);
    writeFileSync(join(block, 'vda', 'serial'), 'other');
    expect(() => findDisk('rw0', block)).toThrow('no disk with serial "rw0" in the guest (there are: other, ro0)');
  });

  it('of the right size have their numbers told, in the order of the question', () => {
    disk('vda', { serial: 'rw0', dev: '254:0' });
    disk('vdb', { serial: 'ro0', dev: '254:16', sectors: 2 });
    const wanted = [
      { serial: 'ro0', bytes: 1024n },
      { serial: 'rw0', bytes: 4096n },
    ];
    expect(findDisks(wanted, block)).toEqual([
      { major: 254, minor: 16 },
      { major: 254, minor: 0 },
    ]);
    expect(written('unbind')).toBe('');
  });

  it('of another size are found again by their driver, and again when their next use is another', () => {
    disk('vdc', { serial: 'rw1' });
    expect(() => findDisks([{ serial: 'rw1', bytes: 512n }], block)).toThrow(
      'the disk rw1 has 4096 bytes in the guest, and 512 on the host',
    );
    expect([written('unbind'), written('bind')]).toEqual(['virtio-vdc', 'virtio-vdc']);
    writeFileSync(join(root, 'drivers/virtio_blk/bind'), '');
    forgetSize('rw1', block);
    expect(written('bind')).toBe('virtio-vdc');
    disk('vdd', { serial: 'rw2' });
    forgetSize('rw2', block);
    expect(written('bind')).toBe('');
  });
});
