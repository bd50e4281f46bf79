import { KilnError } from '../errors.ts';
import type { FileServers } from '../sandbox/volumes.ts';

export const fileServers: FileServers = {
  start: () => Promise.reject(new KilnError('unimplemented', 'bind mounts are not supported yet')),
  adopt: () => Promise.reject(new KilnError('not-found', 'there is no file server')),
};
