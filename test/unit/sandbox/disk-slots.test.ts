import { beforeEach, describe, expect, it } from 'vitest';
import { DiskSlots } from '../../../src/sandbox/disk-slots.ts';
import { readOnlySlots, type SlotName, writableSlots } from '../../../src/vmm/vmm.ts';

const events: string[] = [];
beforeEach(() => {
  events.length = 0;
});
const detach = async (slot: SlotName) => void events.push(`${slot} emptied`);
const vm = {
  free: [...readOnlySlots, ...writableSlots],
  attach: async (slot: SlotName, file: string) => {
    events.push(`${slot} has ${file}`);
    return `serial-${slot}`;
  },
  answer: (attached: Promise<string>) => attached,
  detach,
  claim: async (file: string) => {
    events.push(`${file} taken`);
    return { [Symbol.asyncDispose]: async () => void events.push(`${file} given back`) };
  },
};
const image = { file: '/image', readOnly: true };

describe('the drive slots of a VM', () => {
  it('have a read-only file once, for however many containers', async () => {
    const slots = new DiskSlots();
    const [one, two] = await Promise.all([slots.attach(image, vm), slots.attach(image, vm)]);
    expect(one).toEqual({ slot: 'ro0', serial: 'serial-ro0', file: '/image' });
    expect(two).toEqual(one);
    await slots.release(one, detach);
    expect(events).toEqual(['ro0 has /image']);
    await slots.release(two, detach);
    expect(events).toEqual(['ro0 has /image', 'ro0 emptied']);
  });

  it('have a file for who still wants it when who put it there has given up', async () => {
    const slots = new DiskSlots();
    const given = Promise.reject(new Error('nobody wants it'));
    const first = slots.attach(image, { ...vm, answer: () => given });
    const second = slots.attach(image, vm);
    await expect(first).rejects.toThrow('nobody wants it');
    const disk = await second;
    expect(events).toEqual(['ro0 has /image']);
    await slots.release(disk, detach);
    expect(events.at(-1)).toBe('ro0 emptied');
  });

  it('are free again when what nobody waits for any more has come late', async () => {
    const slots = new DiskSlots();
    const late = Promise.withResolvers<string>();
    const device = { file: '/dev/loop7', readOnly: false, device: true };
    const attaching = slots.attach(device, {
      ...vm,
      attach: () => late.promise,
      answer: () => Promise.reject(new Error('nobody wants it')),
    });
    await expect(attaching).rejects.toThrow('nobody wants it');
    // Meanwhile it is nobody else's.
    expect((await slots.attach({ file: '/other', readOnly: false }, vm)).slot).toBe('rw1');
    late.resolve('serial');
    await slots.gone('/dev/loop7');
    expect(events).toEqual(['/dev/loop7 taken', 'rw1 has /other', 'rw0 emptied', '/dev/loop7 given back']);
    expect((await slots.attach({ file: '/more', readOnly: false }, vm)).slot).toBe('rw0');
    await slots.gone('/dev/loop7');
  });

  it('stay used when what has come late cannot be taken away', async () => {
    const slots = new DiskSlots();
    const giveUp = { ...vm, answer: () => Promise.reject(new Error('nobody wants it')) };
    const attaching = slots.attach(image, { ...giveUp, detach: () => Promise.reject(new Error('stuck')) });
    await expect(attaching).rejects.toThrow('nobody wants it');
    await expect(slots.gone('/image')).rejects.toThrow('stuck');
    expect((await slots.attach(image, vm)).slot).toBe('ro1');
  });

  it('are used again and again', async () => {
    const slots = new DiskSlots();
    for (let round = 0; round < 20; round += 1) {
      const disk = await slots.attach({ file: `/rw-${round}`, readOnly: false }, vm);
      expect(disk.slot).toBe('rw0');
      await slots.release(disk, detach);
    }
  });

  it('run out with an error that says which kind', async () => {
    const slots = new DiskSlots();
    for (const [index] of writableSlots.entries()) await slots.attach({ file: `/rw-${index}`, readOnly: false }, vm);
    await expect(slots.attach({ file: '/more', readOnly: false }, vm)).rejects.toMatchObject({
      code: 'resource-exhausted',
      message: 'the VM has no free writable drive slot for /more',
    });
  });

  it('are not used again when they cannot be emptied', async () => {
    const slots = new DiskSlots();
    const disk = await slots.attach(image, vm);
    const failing = () => Promise.reject(new Error('stuck'));
    await expect(slots.release(disk, failing)).rejects.toThrow('stuck');
    expect((await slots.attach(image, vm)).slot).toBe('ro1');
  });

  it('are emptied before they are used again when putting a file there has failed', async () => {
    const slots = new DiskSlots();
    const failing = { ...vm, attach: () => Promise.reject(new Error('no such file')) };
    await expect(slots.attach(image, failing)).rejects.toThrow('no such file');
    await slots.attach(image, vm);
    expect(events).toEqual(['ro0 emptied', 'ro0 has /image']);
  });

  it('of an earlier kilnd are emptied, except for those that a container has', async () => {
    const slots = new DiskSlots(true);
    const disk = { slot: 'ro3', serial: 's', file: '/image' } as const;
    await slots.claim(disk, vm.claim);
    await slots.claim(disk, vm.claim);
    await slots.emptyDoubtful(detach);
    expect(events).toHaveLength(readOnlySlots.length + writableSlots.length - 1);
    expect(events).not.toContain('ro3 emptied');
    expect(await slots.attach(image, vm)).toEqual(disk);
    for (let users = 3; users > 0; users -= 1) await slots.release(disk, detach);
    expect(events.at(-1)).toBe('ro3 emptied');
  });

  describe('with a device of the host', () => {
    const device = { file: '/dev/loop7', readOnly: false, device: true };

    it('have it once for the containers of a VM, which has it alone', async () => {
      const slots = new DiskSlots();
      const [one, two] = await Promise.all([slots.attach(device, vm), slots.attach(device, vm)]);
      expect(two).toEqual(one);
      expect(one).toMatchObject({ slot: 'rw0', device: true });
      await slots.release(one, detach);
      await slots.release(two, detach);
      expect(events).toEqual(['/dev/loop7 taken', 'rw0 has /dev/loop7', 'rw0 emptied', '/dev/loop7 given back']);
    });

    it('leave it to others that only read, and give it back at their end', async () => {
      const slots = new DiskSlots();
      expect((await slots.attach({ ...device, readOnly: true }, vm)).slot).toBe('ro0');
      expect(events).toEqual(['ro0 has /dev/loop7']);
      await slots.attach({ ...device, file: '/dev/loop8' }, vm);
      await slots[Symbol.asyncDispose]();
      expect(events.slice(1)).toEqual(['/dev/loop8 taken', 'rw0 has /dev/loop8', '/dev/loop8 given back']);
    });

    it('do not have it both ways', async () => {
      const slots = new DiskSlots();
      await slots.attach(device, vm);
      await expect(slots.attach({ ...device, readOnly: true }, vm)).rejects.toThrow(
        '/dev/loop7 cannot be read-only: another container of the VM has it otherwise',
      );
    });

    it('give it back when it cannot be attached, and are free when somebody else has it', async () => {
      const slots = new DiskSlots();
      const failing = { ...vm, attach: () => Promise.reject(new Error('no')) };
      await expect(slots.attach(device, failing)).rejects.toThrow('no');
      expect(events).toEqual(['/dev/loop7 taken', '/dev/loop7 given back']);
      const busy = { ...vm, claim: () => Promise.reject(new Error('busy')) };
      await expect(slots.attach(device, busy)).rejects.toThrow('busy');
      expect((await slots.attach(device, vm)).slot).toBe('rw0');
    });

    it('of an earlier kilnd take it again', async () => {
      const slots = new DiskSlots(true);
      const disk = { slot: 'rw3', serial: 's', file: '/dev/loop7', device: true } as const;
      await slots.claim(disk, vm.claim);
      await slots.release(disk, detach);
      expect(events).toEqual(['/dev/loop7 taken', 'rw3 emptied', '/dev/loop7 given back']);
    });
  });
});
