-- Sends every CT Series to the C-Spine Node as soon as Orthanc calls it stable, and again while the node cannot be reached.
--
-- Only Instances of CT SOP Classes are sent, so neither the node's results (SEG, SR) nor a dose report among the
-- slices ever goes there, and nothing goes round in circles. Whether a Series can be analysed is the node's decision.

local NODE = 'cspine'  -- the node's name in "DicomModalities"

local CT_SOP_CLASSES = {
  ['1.2.840.10008.5.1.4.1.1.2'] = true,    -- CT Image Storage
  ['1.2.840.10008.5.1.4.1.1.2.1'] = true,  -- Enhanced CT Image Storage
  ['1.2.840.10008.5.1.4.1.1.2.2'] = true,  -- Legacy Converted Enhanced CT Image Storage
}
local LONGEST_WAIT_S, MAX_ATTEMPTS = 600, 150  -- which take a day
local NUM_CHANGES = 10000  -- that are looked through at the start
local SENT = '/metadata/4101'  -- of a Series: how many of its Instances the node has got; one says when our time began
local CANCELED = 37  -- Orthanc's code of a job that somebody ended

local growing = {}  -- SeriesInstanceUIDs of what is not stable yet
local jobs = {}  -- by us: the Series of each, and how many Instances it sends; Orthanc itself may soon forget a job
local failed = {}  -- Series: how often, when each is tried again, by which job, and what that sends

local function get(path)
  local answer = RestApiGet(path, true)
  return answer and ParseJson(answer)
end

local function ctInstances(series)
  local found = {}
  for _, instance in ipairs(series.Instances) do
    if CT_SOP_CLASSES[RestApiGet('/instances/' .. instance .. '/metadata/SopClassUid', true)] then
      table.insert(found, instance)
    end
  end
  return found
end

local function tryLater(seriesId, why, jobId, isRefused)
  local attempts = (failed[seriesId] or {attempts = 0}).attempts + 1
  local wait = math.min(5 * 2 ^ (attempts - 1), LONGEST_WAIT_S)
  local sends = jobs[jobId] and jobs[jobId].instances
  local known = {attempts = attempts, at = os.time() + wait, job = jobId, sends = sends, isRefused = isRefused}
  failed[seriesId] = attempts < MAX_ATTEMPTS and known or nil
  local becomes = failed[seriesId] and string.format('Tried again in %d s', wait) or 'When the node answers, resubmit it'
  print('cspine: NOT SENT: ' .. why .. ', job ' .. (jobId or 'none') .. '. ' .. becomes)
end

local function sendSeries(series, instances)
  local failure, jobId = failed[series.ID], nil
  if #instances == 0 then
    failed[series.ID] = nil
    return
  end
  print('cspine: sending ' .. #instances .. ' Instances of Series ' .. series.MainDicomTags.SeriesInstanceUID)
  local sends = table.concat(instances)
  -- The same job as long as it would send the same: Orthanc keeps the last few only. What was deleted makes a job fail.
  if failure and failure.sends == sends and not failure.isRefused then
    jobId = RestApiPost('/jobs/' .. failure.job .. '/resubmit', '{}', true) and failure.job
  end
  if not jobId then
    -- A job in the background: it must not hold up Orthanc. One job is one association, so the node need not wait
    -- for its quiet time to know that it has the whole Series.
    local isPermissive = failure ~= nil and failure.isRefused
    local job = {Resources = instances, Synchronous = false, Permissive = isPermissive}
    local answer = RestApiPost('/modalities/' .. NODE .. '/store', DumpJson(job), true)
    jobId = answer and ParseJson(answer).ID
    if not jobId then
      tryLater(series.ID, 'Orthanc makes no job of it')
      return
    end
    if failure and failure.job then
      jobs[failure.job] = nil
    end
    local uid = series.MainDicomTags.SeriesInstanceUID
    jobs[jobId] = {series = series.ID, uid = uid, num = #instances, instances = sends, isPermissive = isPermissive}
  end
  if failure then
    failure.at, failure.job = math.huge, jobId
  end
end

local function tryAgain()
  for seriesId, failure in pairs(failed) do
    if failure.at <= os.time() then
      local series = get('/series/' .. seriesId)
      if series then
        sendSeries(series, ctInstances(series))
      else
        failed[seriesId] = nil
      end
    end
  end
end

-- What a job sends that is not by us: by hand, or from before Orthanc was restarted.
local function seriesOf(job)
  local found, node = {}, get('/modalities/' .. NODE .. '/configuration')
  if job and node and job.Type == 'DicomModalityStore' and job.Content.RemoteAet == node.AET then
    for _, id in ipairs(job.Content.ParentResources) do
      local instance, study = get('/instances/' .. id), get('/studies/' .. id)
      for _, seriesId in ipairs(study and study.Series or {instance and instance.ParentSeries or id}) do
        found[seriesId] = true
      end
    end
  end
  return found
end

-- What an Orthanc that ends never says or does: it forgets what is not stable yet, and may lose what it was about to do.
-- What was stable before this script was first run is left alone.
local function sendWhatCameBefore()
  local seriesOf, isStable, order = {}, {}, {}
  local since = math.max(0, get('/changes?last').Last - NUM_CHANGES)
  for _, change in ipairs(get(string.format('/changes?since=%d&limit=%d', since, NUM_CHANGES)).Changes) do
    if change.ChangeType == 'NewInstance' then
      local instance = not seriesOf[change.ID] and get('/instances/' .. change.ID)
      local series = instance and get('/series/' .. instance.ParentSeries)
      if series then
        table.insert(order, series)
        for _, id in ipairs(series.Instances) do
          seriesOf[id] = series.ID
        end
      end
      isStable[seriesOf[change.ID] or change.ID] = false
    elseif change.ChangeType == 'StableSeries' then
      isStable[change.ID] = true
    end
  end
  local isOurTime = false
  for _, series in ipairs(order) do
    local instances, sent = ctInstances(series), RestApiGet('/series/' .. series.ID .. SENT, true)
    isOurTime = isOurTime or sent ~= nil
    if sent ~= tostring(#instances) and (isOurTime or not isStable[series.ID]) then
      sendSeries(series, instances)
    end
  end
end

-- All scripts of an Orthanc share their functions: what another one does is kept, if it is listed before this one.
local function after(earlier, ours)
  return function(...)
    local isWell, fault = true, nil
    if earlier then
      isWell, fault = pcall(earlier, ...)
    end
    ours(...)
    if not isWell then
      error(fault, 0)
    end
  end
end

Initialize = after(Initialize, sendWhatCameBefore)

-- With the first Instance of what comes or grows the node has not all of it any more.
OnStoredInstance = after(OnStoredInstance, function(instanceId, tags)
  local instance = not growing[tags.SeriesInstanceUID] and get('/instances/' .. instanceId)
  if instance then
    growing[tags.SeriesInstanceUID] = true
    RestApiPut('/series/' .. instance.ParentSeries .. SENT, '0', true)
  end
end)

OnStableSeries = after(OnStableSeries, function(seriesId)
  local series = get('/series/' .. seriesId)
  if series then
    growing[series.MainDicomTags.SeriesInstanceUID] = nil
    sendSeries(series, ctInstances(series))
  end
  tryAgain()
end)

OnJobSuccess = after(OnJobSuccess, function(jobId)
  local job = jobs[jobId]
  if job and job.isPermissive then  -- Orthanc does not say whether all of it went
    tryLater(job.series, 'the node refused some of it', jobId)
  elseif job then
    if failed[job.series] and failed[job.series].job == jobId then
      failed[job.series] = nil
    end
    if not growing[job.uid] then
      RestApiPut('/series/' .. job.series .. SENT, string.format('%d', job.num), true)
    end
  end
  jobs[jobId] = nil
  tryAgain()
end)

OnJobFailure = after(OnJobFailure, function(jobId)
  local ours, job = jobs[jobId], get('/jobs/' .. jobId)
  for seriesId in pairs(ours and {[ours.series] = true} or seriesOf(job)) do
    if job and job.ErrorCode == CANCELED then
      failed[seriesId] = nil
    else
      -- The node answers, so what it takes shall not wait for what it refuses. Only then: where nobody answers, such a
      -- job would wait for that at each Instance, and Orthanc would call it a success.
      local isRefused = job ~= nil and string.find(job.ErrorDetails or '', 'DIMSE status', 1, true) ~= nil
      tryLater(seriesId, job and job.ErrorDescription or 'Orthanc does not say why', jobId, isRefused)
    end
  end
end)

OnHeartBeat = after(OnHeartBeat, tryAgain)  -- an Orthanc before 1.11.1 has none, so a job waits for what else happens
