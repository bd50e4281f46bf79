import type { FileServers } from '../sandbox/volumes.ts';
import { VolumeServer } from '../volume/server.ts';
import { volumesProgram as program } from './installation.ts';

export const fileServers: FileServers = {
  start: ({ directory, controlGroup }) => VolumeServer.start({ program, directory, controlGroup }),
  adopt: (record, { directory, controlGroup }) => VolumeServer.adopt(record, { program, directory, controlGroup }),
};
