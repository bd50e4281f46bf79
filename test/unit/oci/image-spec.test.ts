import { describe, expect, it } from 'vitest';
import { toGuestSpec } from '../../../src/oci/guest-spec.ts';
import { type ImageProcess, imageSpec } from '../../../src/oci/image-spec.ts';
import { errorOf } from './specs.ts';

const user = { uid: 1, gid: 2, additionalGids: [3] };
const specOf = (image: ImageProcess, command: string[] = [], terminal = false) =>
  imageSpec({ image, command, user, hostname: 'h', terminal });

describe('the spec of an image', () => {
  it.each([
    [{ Cmd: ['sh'] }, [], ['sh']],
    [{ Entrypoint: ['/e'], Cmd: ['a'] }, [], ['/e', 'a']],
    [{ Entrypoint: ['/e'], Cmd: ['a'] }, ['b', 'c'], ['/e', 'b', 'c']],
    [{ Entrypoint: null, Cmd: null }, ['ls'], ['ls']],
  ])('runs what %j and the command %j say', (image, command, args) => {
    expect(specOf(image, command).process.args).toEqual(args);
  });

  it('has the image’s user, variables and folder', () => {
    const { process, hostname } = specOf({ Cmd: ['sh'], Env: ['PATH=/x', 'A=b'], WorkingDir: 'srv' }, [], true);
    expect(process).toMatchObject({ user, env: ['PATH=/x', 'A=b', 'TERM=xterm'], cwd: '/srv', terminal: true });
    expect(hostname).toBe('h');
    expect(specOf({ Cmd: ['sh'] }).process).toMatchObject({ env: [expect.stringMatching(/^PATH=/)], cwd: '/' });
  });

  it('can be run without a warning', () => {
    expect(toGuestSpec(specOf({ Cmd: ['sh'] }), { id: 'c', rootfsPath: '/r' }).warnings).toEqual([]);
  });

  it('is refused for an image without a program', () => {
    expect(errorOf(() => specOf({}))).toMatchObject({ message: 'the image names no program to run' });
  });
});
